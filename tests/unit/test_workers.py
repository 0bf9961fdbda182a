"""Several processes at one job: what they return, how one that dies is told, what is shown meanwhile."""

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from hymeg.checkpoint import row_tensors, workers
from hymeg.checkpoint.compare import compare_checkpoints
from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.sinks import transfer
from hymeg.checkpoint.workers import run
from hymeg.errors import UserError
from hymeg.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_to_do_is_done():
    stream = Terminal()
    assert run(lambda share, report: share, [], Progress("x", 0, stream)).results == []
    assert "x: 100% of 0.00 GB" in stream.getvalue()


def test_results_come_in_the_order_of_the_shares_and_bytes_are_counted(monkeypatch):
    shown = []
    monkeypatch.setattr(Progress, "show", lambda self, done, at_end=False: shown.append(done))

    def work(share, report):
        for _ in range(share):
            report(10)
        return os.getpid(), share

    outcome = run(work, [3, 1, 2], Progress("x", 60, io.StringIO()))
    assert [share for _, share in outcome.results] == [3, 1, 2]
    assert len({pid for pid, _ in outcome.results} | {os.getpid()}) == 4
    assert shown[-1] == 60 and outcome.peak_bytes > 4 * 10**6


def test_what_a_worker_raises_is_raised_here():
    def refuses(share, report):
        raise UserError("the disk is on fire")

    def fails(share, report):
        raise KeyError("lost")

    with pytest.raises(UserError, match="the disk is on fire"):
        run(refuses, [1], Progress("x", 0, io.StringIO()))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'lost'"):
        run(fails, [1, 2], Progress("x", 0, io.StringIO()))


@pytest.mark.parametrize("direction", ["hf-to-dist", "dist-to-hf"])
def test_a_worker_that_is_killed_ends_the_conversion_with_nothing_left(
    hf_checkpoint, dist_checkpoint, tmp_path, monkeypatch, direction
):
    write_task, parent = transfer._write_task, os.getpid()

    def killed(reader, task, *rest):
        assert os.getpid() != parent
        write_task(reader, task, *rest)
        if task.tensor.key.startswith("decoder.layers.3"):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out

    monkeypatch.setattr(transfer, "_write_task", killed)
    convert, given = {"hf-to-dist": (hf_to_dist, hf_checkpoint), "dist-to-hf": (dist_to_hf, dist_checkpoint)}[direction]
    with pytest.raises(
        UserError, match=r"a worker process was killed by SIGKILL before its share was done; out of memory\?"
    ):
        convert(given, tmp_path / "target")
    assert os.listdir(tmp_path) == []


def test_a_worker_whose_parent_is_killed_ends_though_its_result_is_large(tmp_path):
    def work(share, report):
        parent = os.getppid()
        (tmp_path / "pid").write_text(str(os.getpid()))
        while os.getppid() == parent:
            time.sleep(0.01)
        return bytes(10 << 20)

    context = multiprocessing.get_context("fork")
    parent = context.Process(target=lambda: run(work, [1, 2]))
    parent.start()
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    worker = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    try:
        while Path(f"/proc/{worker}").exists() and "Z (zombie)" not in Path(f"/proc/{worker}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_parts_are_dealt_to_whoever_asks_each_once():
    parts = workers.dealt(range(1000))
    results = run(lambda share, report: list(share), [parts] * 3).results
    assert sorted(number for result in results for number in result) == list(range(1000))
    assert all(result == sorted(result) for result in results)


@pytest.mark.parametrize(("num_files", "num_workers", "expected"), [(8, 2, 8), (7, 2, 2), (1, 3, 3), (12, 1, 12)])
def test_whole_files_are_dealt_where_there_are_several_for_each_worker(num_files, num_workers, expected):
    tasks = [
        transfer.Task(row_tensors.RowTensor("key", "BF16", (1, 5), ()), [(0, 1)], "BF16", f"file{file}", 10 * i)
        for file in range(num_files)
        for i in range(6)
    ]
    found = transfer.turns(tasks, num_workers)
    assert len(found) == expected and [task for share in found for task in share] == tasks
    if expected == num_files:
        assert [len({task.file for task in share}) for share in found] == [1] * num_files


def test_no_more_files_are_open_than_a_process_may_have(hf_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(row_tensors, "_MAX_OPEN_FILES", 1)
    monkeypatch.setattr(transfer, "_MAX_FLUSHES", 1)
    monkeypatch.setattr(transfer, "_MIN_FILE_BYTES", 1)
    hf_to_dist(hf_checkpoint, tmp_path / "dist", workers=5, verify=True)
    assert len(list((tmp_path / "dist" / "release").glob("*.distcp"))) > 16
    opened, limit = os.open, len(os.listdir("/proc/self/fd")) + 12

    def scarce(*args, **kwargs) -> int:
        if len(os.listdir("/proc/self/fd")) > limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(*args, **kwargs)

    monkeypatch.setattr(os, "open", scarce)
    dist_to_hf(tmp_path / "dist", tmp_path / "out", max_shard_bytes=20_000, workers=1)
    monkeypatch.undo()
    assert compare_checkpoints(hf_checkpoint, tmp_path / "out") == []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20
