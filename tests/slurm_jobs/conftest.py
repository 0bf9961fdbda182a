import subprocess
import sys
from pathlib import Path

import cluster
import psutil
import pytest
import small_training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running cluster; without one that can be started here the tests are skipped."""
    if (why := cluster.missing()) is not None:
        pytest.skip(why)
    with cluster.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The files of a small training."""
    folder = tmp_path_factory.mktemp("training")
    small_training.write(folder)
    return folder


@pytest.fixture(scope="session")
def start():
    """Start a command; when the tests end, however they do, so does what it has started."""
    started = []

    def start(command: list[object], log: Path) -> subprocess.Popen:
        with log.open("w") as output:
            words, environment = [str(word) for word in command], small_training.ENVIRONMENT
            started.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()


@pytest.fixture(scope="session")
def losses_left_in_peace(start, training) -> dict[int, float]:
    """Step -> loss, of the plain torchrun line for two nodes."""
    rendezvous = f"--rdzv-backend c10d --rdzv-endpoint localhost:{cluster.free_port()} --rdzv-id run1".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, *rendezvous]
    words = ["--config", training / "recipe.yaml", *small_training.flags(training, training / "plain")]
    words += ["--save-interval", small_training.NUM_STEPS]
    logs = [training / f"plain{node}.log" for node in (0, 1)]
    nodes = [start([*torchrun, "pretrain_hy.py", *words], log) for log in logs]
    assert [node.wait() for node in nodes] == [0, 0], logs[0].read_text()[-3000:]
    return small_training.losses("".join(log.read_text() for log in logs))
