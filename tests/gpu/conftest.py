"""Tests marked `gpu` are skipped where there is none; the others run their comparison on CPU as well, with the local
layer spec, so that the code that will judge a GPU has itself been run. `single_process` is the unit tests'."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from hymeg import platform

platform.install()

from comparison import SHAPES, write_checkpoint  # noqa: E402


def pytest_collection_modifyitems(items):
    if platform.is_cpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(
                        reason="torch sees no CUDA device (or HYMEG_PLATFORM=cpu): run on a GPU, see docs/gpu.md"
                    )
                )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders by name of a shape: fp32 checkpoints, written when first asked for."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), {}

    def get(shape: str, **changes) -> str:
        name = "-".join([shape, *(f"{key}={value}" for key, value in changes.items())])
        if name not in written:
            write_checkpoint(folder / name, SHAPES[shape] | changes)
            written[name] = str(folder / name)
        return written[name]

    return get
