"""Two runs do not write to one folder; older checkpoints go and the needed ones stay."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from hymeg.errors import UserError
from hymeg.training import save_lock
from hymeg.training.checkpoints import remove_older, surplus
from hymeg.training.run_record import beat

FORK = multiprocessing.get_context("fork")


def held_by(folder, launcher: bool = False) -> tuple[multiprocessing.Process, int]:
    """A process that holds the lock, and its id; with a `launcher`, which is what is returned, between."""
    reading, writing = FORK.Pipe(duplex=False)

    def hold() -> None:
        save_lock.lock(str(folder), lambda line: None)
        writing.send(os.getpid())
        time.sleep(100)

    def launch() -> None:
        FORK.Process(target=hold).start()
        time.sleep(100)

    process = FORK.Process(target=launch if launcher else hold)
    process.start()
    return process, reading.recv()


def test_a_second_run_is_refused_and_a_killed_one_s_lock_taken_over(tmp_path):
    process, pid = held_by(tmp_path)
    with pytest.raises(UserError, match=rf"another run writes to it, process {pid} on '{socket.gethostname()}', since"):
        save_lock.lock(str(tmp_path), print)
    process.kill()
    process.join()
    said: list[str] = []
    save_lock.lock(str(tmp_path), said.append)
    assert len(said) == 1 and f"taken over from a run that is gone, process {pid}" in said[0]
    save_lock.check_still_ours(str(tmp_path))
    save_lock.lock(str(tmp_path), said.append)  # the same run, once more
    assert len(said) == 1
    save_lock.unlock(str(tmp_path))
    assert not (tmp_path / save_lock.LOCK).exists()


def test_a_run_in_another_container_of_this_machine_lives_as_long_as_it_holds_the_lock(tmp_path):
    """Its process is not seen here, or another has its number."""
    process, _ = held_by(tmp_path)
    path = tmp_path / save_lock.LOCK
    found = json.loads(path.read_text())
    for unseen in ({"pid": 2**22 + 1}, {"born": "0"}):
        path.write_text(json.dumps(found | unseen))
        with pytest.raises(UserError, match="another run writes to it, process"):
            save_lock.lock(str(tmp_path), print)
    process.kill()
    process.join()
    save_lock.lock(str(tmp_path), lambda line: None)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    save_lock.unlock(str(tmp_path))


def test_a_launch_on_the_same_port_is_another_run(tmp_path, monkeypatch):
    """torchrun --master-port gives every launch the same name."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    process, pid = held_by(tmp_path)
    try:
        with pytest.raises(UserError, match=f"another run writes to it, process {pid}"):
            save_lock.lock(str(tmp_path), print)
        with pytest.raises(UserError, match="has taken it over from this run"):
            save_lock.check_still_ours(str(tmp_path))
        monkeypatch.setenv("RANK", "1")  # of the run that holds it, or of this one, for all it knows
        save_lock.check_still_ours(str(tmp_path))
    finally:
        process.kill()
        process.join()


def test_an_orphan_loses_its_folder_and_writes_no_more(tmp_path):
    launcher, orphan = held_by(tmp_path, launcher=True)
    try:
        launcher.kill()
        launcher.join()
        save_lock.lock(str(tmp_path), lambda line: None)
        found = json.loads((tmp_path / save_lock.LOCK).read_text())
        (tmp_path / save_lock.LOCK).write_text(json.dumps(found | {"run": "the next"}))
        with pytest.raises(UserError, match="has taken it over from this run"):
            save_lock.check_still_ours(str(tmp_path))
    finally:
        os.kill(orphan, 9)


def test_a_run_on_another_machine_lives_as_long_as_it_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(save_lock, "_SECONDS_TO_SEE_ONE", 1.2)
    path = tmp_path / save_lock.LOCK
    path.write_text(json.dumps({"run": "another", "host": "elsewhere", "pid": 7, "since": "yesterday"}))
    sleep = time.sleep

    def touched(seconds: float) -> None:
        os.utime(path, (time.time() + 5, time.time() + 5))
        sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(save_lock.time, "sleep", touched)
        with pytest.raises(UserError, match="another run writes to it, process 7 on 'elsewhere'"):
            save_lock.lock(str(tmp_path), print)
    save_lock.lock(str(tmp_path), lambda line: None)
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_the_newest_the_multiples_and_the_needed_stay():
    assert surplus([10, 20, 30, 40, 50], 2, None, set()) == [10, 20, 30]
    assert surplus([10, 20, 30, 40, 50], 1, 20, {10}) == [30]
    assert surplus([10], 1, None, set()) == []


@pytest.fixture
def left_by_removal(tmp_path):
    """Of complete iterations 2, 4, 6 and 8, of which the tracker names one, those that are kept; 4 never is."""

    def left(tracked: int, **what) -> list[int]:
        for step in (2, 4, 6, 8):
            (tmp_path / f"iter_{step:07d}").mkdir()
            (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(tracked))
        remove_older(str(tmp_path), keep_every=None, **what)
        deadline = time.monotonic() + 10
        while (tmp_path / "iter_0000004").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return sorted(int(path.name.removeprefix("iter_")) for path in tmp_path.glob("iter_*"))

    return left


def test_older_checkpoints_are_removed_but_not_what_the_tracker_names(left_by_removal):
    assert left_by_removal(6, new=8, keep_last=1, loaded=2) == [2, 6, 8]


def test_of_a_run_that_went_back_the_newest_is_kept_and_not_those_after_it(left_by_removal):
    """As by --ckpt-step 2, --fall-back-to-older-checkpoint or --finetune: the tracker names 8 until 6 is saved."""
    assert left_by_removal(8, new=6, keep_last=1, loaded=2) == [2, 6, 8]


def test_the_heartbeat_says_how_the_run_is(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    beat(str(tmp_path), 7, 1.5, " iteration 7/8 | lm loss: 6.9E+00 | ")
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["iteration"], found["loss"], found["seconds_per_iteration"], found["last_checkpoint"]) == (
        7,
        6.9,
        1.5,
        6,
    )
