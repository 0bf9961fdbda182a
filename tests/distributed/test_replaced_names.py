"""The platform replaces no name that nobody calls."""

import pytest

from hymeg import platform
from hymeg.platform.patches import INSTALLED

DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
TRAININGS = [  # size of the world, flags, checkpoint: the same as other tests', which have run them
    (1, "", "trunk"),
    (2, "--tensor-model-parallel-size 2", "trunk"),
    (2, "--pipeline-model-parallel-size 2", "mtp"),
    (2, "--context-parallel-size 2", "mtp"),
    (2, "--expert-model-parallel-size 2", "trunk"),
    (2, "--expert-tensor-parallel-size 2", "trunk"),
    (2, DISTRIBUTED, "trunk"),
]
BY_FLAGS = {
    "device_memory_used": "--log-device-memory-used",
    "is_current_stream_capturing": "--moe-routing-trace-path",
    "get_async_strategy": "--save",
    "save": "--save",
    "save_config": "--save",
    "evaluate_and_print_results": "--eval-iters",
    "dummy_train_step": "--iterations-to-skip",
}
"""Called under flags that no test here gives, or elsewhere."""


@pytest.mark.skipif(not platform.is_cpu(), reason="the names are replaced on CPU only")
def test_every_replaced_name_is_called(worlds, command):
    called = {
        name
        for size, flags, checkpoint in TRAININGS
        for name in worlds.run(size, command(flags, checkpoint=checkpoint))["called"]
    }
    labels = {f"{getattr(p.owner, '__name__', type(p.owner).__name__)}.{p.name}" for p in INSTALLED}
    assert sorted(label for label in labels - called if label.rpartition(".")[2] not in BY_FLAGS) == []
