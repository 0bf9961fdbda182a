"""The check before every start, as it runs on the nodes but without Slurm: what is wrong with a node is said with its
name, and nothing starts.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cluster import free_port

import hymeg
from hymeg.errors import UserError
from hymeg.launch.checks import (
    _folder_problems,
    check_num_gpus,
    check_run,
    gpu_problems,
    host_gib,
    node_problems,
    read_run,
    versions,
)
from hymeg.launch.health import compare
from hymeg.platform import device

ROOT = Path(__file__).parents[2]


class Nodes:
    """n0, the first one, and n1."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.save = folder / "save"
        self.start = folder / "start"
        self.start.mkdir()
        (folder / "recipe.yaml").write_text("lr: 1e-3\n")

    def node(
        self,
        name: str,
        *,
        recipe="recipe.yaml",
        port=None,
        processes=1,
        seconds=600,
        cwd: Path = ROOT,
        **variables: object,
    ):
        at = [
            "--name",
            name,
            "--nodes",
            "n0,n1",
            "--head",
            f"127.0.0.1:{port or self.port}",
            "--folder",
            str(self.start),
        ]
        words = [str(self.folder / recipe), "--save", str(self.save), "--load", str(self.save)]
        how = ["--processes", str(processes), "--seconds", str(seconds), *words]
        environment = (
            os.environ
            | {"HYMEG_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            | {name: str(value) for name, value in variables.items()}
        )
        environment["PYTHONPATH"] = f"{environment.get('PYTHONPATH', '')}:{ROOT}"
        command = [sys.executable, "-m", "hymeg.launch.health", *at, *how]
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def check(self, **of_n1) -> tuple[list[int], list[str]]:
        """Exit codes, and what both have said; `of_n1` makes n1 different from n0."""
        nodes = [self.node("n0"), self.node("n1", **of_n1)]
        said = "".join(node.communicate()[0] for node in nodes)
        return [node.returncode for node in nodes], said.splitlines()


@pytest.fixture
def nodes(tmp_path):
    return Nodes(tmp_path)


def test_nodes_that_are_fit(nodes):
    assert nodes.check() == ([0, 0], ["hymeg: 2 nodes are fit: n0, n1"])
    assert list(nodes.save.iterdir()) == [] and list(nodes.start.iterdir()) == []


def test_too_little_memory(nodes):
    codes, (said,) = nodes.check(processes=100000)
    assert codes == [1, 1]
    assert said.startswith("error: n1: ") and "GiB are free, 50000 are needed for 100000 processes" in said
    assert (nodes.start / "unfit").read_text() == "n1\n"


def test_too_little_memory_for_what_the_recipe_was_planned_with(nodes):
    comment = "# tools/plan.py: fullest GPU 64.0 of 73.8 GiB (stage 5), 80,000 GiB of host memory a node;"
    (nodes.folder / "recipe.yaml").write_text(f"{comment}\nlr: 1e-3\n")
    codes, (said,) = nodes.check(HYMEG_HOST_GIB=0.25)
    assert codes == [1, 1]  # n1 was told that it needs less
    assert said.startswith("error: n0: ") and "GiB are free, 10000 are needed for 1 processes" in said


def test_gpus_that_are_busy_and_gpus_that_torch_does_not_see(nodes, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0, 62345, 81559\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    codes, said = nodes.check(HYMEG_PLATFORM="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert codes == [1, 1] and len(said) == 2
    assert said[0].startswith("error: n1: GPU 0 is not idle: 61 of 80 GiB are in use")
    assert said[1].startswith("error: n1: torch ") and "sees 0 GPUs, 1 are needed" in said[1]


def test_a_clock_that_is_wrong(nodes, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() - 3600\n")
    codes, (said,) = nodes.check(PYTHONPATH=tmp_path)
    assert codes == [1, 1] and re.match(r"error: n1: its clock is -3[56]\d\d s off that of n0; ", said)


def test_another_version(nodes, tmp_path):
    other = tmp_path / "transformers-0.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0\n")
    codes, (said,) = nodes.check(PYTHONPATH=tmp_path)
    assert codes == [1, 1] and said.startswith("error: n1: transformers is 0.0, but ")


def test_a_folder_that_cannot_be_written_to(nodes):
    nodes.save.write_text("a file")
    codes, said = nodes.check()
    assert codes == [1, 1] and [line.split(": ")[1] for line in said] == ["n0", "n1"]
    assert all("save is not writable from this node (File exists)" in line for line in said)


@pytest.mark.parametrize(("free", "said"), [(0, ["no space left on its disk"]), (1, [])])
def test_a_full_disk(tmp_path, monkeypatch, free, said):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    found = list(_folder_problems(tmp_path / "new"))
    assert [line.split(": ")[1].partition(";")[0] for line in found] == said
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_is_not_shared(nodes, tmp_path):
    nodes.save = f"/proc/self/cwd/{os.urandom(4).hex()}"  # below the node's own working directory
    (tmp_path / "n0").mkdir(), (tmp_path / "n1").mkdir()
    first, second = nodes.node("n0", cwd=tmp_path / "n0"), nodes.node("n1", cwd=tmp_path / "n1")
    said = first.communicate()[0] + second.communicate()[0]
    assert [first.returncode, second.returncode] == [1, 1]
    assert said.startswith(f"error: n1: {nodes.save} is not the same folder as on n0") and said.count("\n") == 1


def test_a_node_that_cannot_reach_the_first_one(nodes):
    first, second = nodes.node("n0", seconds=3), nodes.node("n1", seconds=3, port=free_port())
    said = [node.communicate()[0] for node in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1]
    assert said[0].startswith("error: n1: no word within 3 s: ")
    assert said[1].startswith("error: n1: cannot reach 127.0.0.1:") and "HYMEG_PORT" in said[1]


def test_a_port_that_another_program_listens_at(nodes):
    with socket.create_server(("", nodes.port)) as other:
        first, second = nodes.node("n0"), nodes.node("n1")
        other.accept()[0].close()
        said = [node.communicate()[0] for node in (first, second)]
    assert [first.returncode, second.returncode] == [1, 1]
    problem = f"port {nodes.port} cannot be listened at (Address already in use); set HYMEG_PORT to a free one"
    assert said[0] == f"error: n0: {problem}\n"
    assert said[1].startswith(f"error: n1: 127.0.0.1:{nodes.port} is not the first node's check")


def test_a_recipe_that_is_wrong_is_said_by_the_first_node_before_another_ends(nodes):
    """Slurm kills all others as soon as one has ended."""
    second = nodes.node("n1", recipe="a_16xh100_80gb.yaml")
    (nodes.folder / "a_16xh100_80gb.yaml").write_text("lr: 1e-3\n")
    first = nodes.node("n0", recipe="a_16xh100_80gb.yaml")
    assert "a_16xh100_80gb.yaml is for 16 GPUs, and this job has 2 nodes x 1 = 2" in first.communicate()[0]
    assert first.returncode == 2 and second.poll() is None and (nodes.start / "refused").exists()
    second.kill()
    second.communicate()


def test_a_recipe_that_one_node_cannot_read(nodes):
    codes, (said,) = nodes.check(recipe="nowhere.yaml")
    assert codes == [1, 1] and said.startswith("error: n1: ") and "nowhere.yaml cannot be read" in said


def test_who_connects_and_says_nothing_is_not_waited_for(nodes):
    """A scan of the ports, or a node that hangs: the others are heard, and named if they are not fit."""
    first = nodes.node("n0")
    silent = None
    while silent is None:
        assert first.poll() is None
        with contextlib.suppress(ConnectionRefusedError):
            silent = socket.create_connection(("127.0.0.1", nodes.port))
    with silent:
        silent.recv(1)  # it listens to us now
        second = nodes.node("n1")
        assert first.communicate()[0] == "hymeg: 2 nodes are fit: n0, n1\n"
        assert [first.returncode, second.wait()] == [0, 0]
    second.stdout.close()


def test_busy_or_missing_gpus_are_named():
    table = "0, 4, 81559\n1, 62345, 81559\n[GPU is lost]\n"
    assert list(gpu_problems(table, 2)) == [
        "GPU 1 is not idle: 61 of 80 GiB are in use; end what runs there (see nvidia-smi)"
    ]
    assert "shows 2 working GPUs, 3 are needed" in next(gpu_problems(table, 3))
    assert list(gpu_problems("0, 4, 81559\n1, 4, 81559\n", 2)) == []


def test_gpus_on_which_cuda_does_not_start_are_none(monkeypatch):
    monkeypatch.delenv("HYMEG_PLATFORM", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(device, "count", lambda: 8)
    monkeypatch.setattr(device, "current", lambda: torch.device("cpu"))
    (said,) = node_problems(1, 0, [])
    assert "sees 0 GPUs, 1 are needed" in said

    def fail():
        raise RuntimeError("CUDA error: busy\nand more")

    monkeypatch.setattr(device, "current", fail)
    assert list(node_problems(1, 0, [])) == [
        "CUDA does not start: CUDA error: busy; check the driver (nvidia-smi), or leave the node out"
    ]


def test_what_differs_between_nodes_is_said_of_the_node(tmp_path):
    def facts(torch="2.13.0", **others):
        return {"problems": [], "versions": {"torch": torch}, "clock": 0.0, "tokens": {str(tmp_path): "token"}} | others

    for node in ("n1", "n2", "n3", "n4"):
        (tmp_path / f".hymeg-health-{node}").write_text("token")
    heard = {
        "n0": facts(),
        "n1": facts(),
        "n2": facts("2.12.0"),
        "n3": facts(clock=-61.2),
        "n4": facts(tokens={str(tmp_path): ""}),
    }
    found = dict(compare(heard, ["n0", "n1", "n2", "n3", "n4", "n5"], [tmp_path], "token", 180))
    assert list(found) == ["n2", "n3", "n4", "n5"]
    assert "torch is 2.12.0, but 2.13.0 on n0" in found["n2"] and "-61 s off that of n0" in found["n3"]
    assert "not the same folder as on n0" in found["n4"] and "no word within 180 s" in found["n5"]


def test_another_copy_of_hymeg_is_another_version(tmp_path):
    package = Path(hymeg.__file__).parent
    shutil.copytree(package, tmp_path / "hymeg", ignore=shutil.ignore_patterns("__pycache__"))
    assert versions(tmp_path / "hymeg") == versions()
    with open(tmp_path / "hymeg" / "checkpoint" / "convert.py", "a") as file:
        file.write("# edited here alone\n")
    (changed,) = versions(tmp_path / "hymeg").items() - versions().items()
    assert changed[0] == "hymeg's files"


def test_number_of_gpus_is_held_against_the_recipes_name():
    recipe = "examples/hy3/continue_256xh100_80gb_bf16.yaml"
    assert check_num_gpus(recipe, 32, 8, any_number=False) is None
    assert check_num_gpus("examples/tiny_cpu/pretrain_fp32.yaml", 1, 1, any_number=False) is None
    assert "this job has 64 nodes x 8 = 512" in check_num_gpus(recipe, 64, 8, any_number=False)
    with pytest.raises(UserError, match=r"256 GPUs.*31 nodes x 8 = 248.*--nodes 32"):
        check_num_gpus(recipe, 31, 8, any_number=False)
    assert "2 nodes x 8 = 16" in check_num_gpus(recipe, 2, 8, any_number=True)


@pytest.fixture
def recipe(tmp_path):
    """Its name, and what it holds."""
    (tmp_path / "recipe.yaml").write_text("save: out\nload: elsewhere\n")
    return tmp_path / "recipe.yaml"


def test_a_requeued_job_must_find_its_checkpoints(recipe):
    assert read_run(str(recipe), ["--lr", "1", "--load=out"])[:3] == ("out", "out", None)
    check_run(read_run(str(recipe), ["--load", "out/"]))
    with pytest.raises(UserError, match="--save out with --load elsewhere"):
        check_run(read_run(str(recipe), []))
    recipe.write_text("load: out\n")
    with pytest.raises(UserError, match="no --save"):
        check_run(read_run(str(recipe), []))
    recipe.write_text("save: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        read_run(str(recipe), [])


@pytest.mark.parametrize("words", [["--ckpt-step", "7"], ["--ckpt-step=7"], "ckpt-step: 7\n", "ckpt_step: 7\n"])
def test_a_requeued_job_must_not_go_back_to_the_same_step_in_each_life(recipe, words):
    recipe.write_text("save: out\nload: out\n" + (words if isinstance(words, str) else ""))
    with pytest.raises(UserError, match=r"--ckpt-step 7: .* write 7 into out/latest_checkpointed_iteration.txt"):
        check_run(read_run(str(recipe), [] if isinstance(words, str) else words))


@pytest.mark.parametrize(
    ("recipe_says", "words", "flag"),
    [
        ("", ["--bf16", "--finetune", "--lr", "1"], "--finetune"),
        ("no-load-optim: true\n", [], "--no-load-optim"),
        ("finetune: true\n", ["--no-finetune"], None),
        ("finetune: false\n", [], None),
    ],
)
def test_a_requeued_job_must_not_begin_anew_in_each_life(recipe, recipe_says, words, flag):
    recipe.write_text(f"save: out\nload: out\n{recipe_says}")
    with contextlib.nullcontext() if flag is None else pytest.raises(UserError, match=f"{flag}: a requeued job would"):
        check_run(read_run(str(recipe), words))


@pytest.mark.parametrize(
    ("comment", "variables", "gib"),
    [
        ("", {}, 16),
        ("", {"HYMEG_PLATFORM": "cpu"}, 1),
        ("# plan: 64.0 GiB (stage 5), 394 GiB of host memory a node; 6 s\n", {}, 98.5),
        ("# 8,000 GiB of host memory a node\n", {"HYMEG_PLATFORM": "cpu"}, 2000),
        ("# 8,000 GiB of host memory a node\n", {"HYMEG_HOST_GIB": "30"}, 30),
    ],
)
def test_host_memory_that_a_node_of_two_processes_needs(recipe, monkeypatch, comment, variables, gib):
    for name in ("HYMEG_PLATFORM", "HYMEG_HOST_GIB"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe.write_text(f"# for chats\n{comment}save: out\n")
    assert host_gib(read_run(str(recipe), []), 2) == gib


def test_host_memory_that_is_no_number(recipe, monkeypatch):
    monkeypatch.setenv("HYMEG_HOST_GIB", "400G")
    with pytest.raises(UserError, match="HYMEG_HOST_GIB '400G': the GiB of host memory"):
        host_gib(read_run(str(recipe), []), 8)
