"""A tiny checkpoint in both formats, for tests that only read it; and no test writes to the user's cache."""

import gc
import os
import resource

import pytest


def pytest_configure():
    """Most machines allow a process 1,024 open files, and more if it asks: a world in which many cases run has process
    groups by the hundred. And what is imported with the tests stays: nobody looks for garbage in it.
    """
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: one more than there are cores, since jobs, launchers and worlds of processes wait for one another."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


ROOMS = ("tests/slurm_jobs/", "tests/distributed/test_transformer_engine.py", "tests/distributed/")
LONGEST_FIRST = ("tests/slurm_jobs/", "tests/end_to_end/test_demo.py", "tests/distributed/", "tests/end_to_end/")


def pytest_collection_modifyitems(items):
    """Begun last, they would be waited for by idle cores."""

    def place(item) -> int:
        return next((n for n, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What shares fixtures that are dear goes to one process: a room with its worlds or its cluster, elsewhere a
    file. In the order of the tests: xdist itself would begin with the file that has most of them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return next((room for room in ROOMS if file.startswith(room)), file)

    config.option.loadscopereorder = False
    return ByRoom(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", os.fspath(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    """A bf16 hub checkpoint with an MTP layer, in several shards."""
    from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("convert") / "hf"
    write_tiny_checkpoint(folder, num_mtp_layers=1, max_shard_bytes=300_000)
    return folder


@pytest.fixture(scope="session")
def dist_checkpoint(hf_checkpoint):
    """The same, converted."""
    from hymeg.checkpoint.convert import hf_to_dist

    hf_to_dist(hf_checkpoint, hf_checkpoint.parent / "dist")
    return hf_checkpoint.parent / "dist"
