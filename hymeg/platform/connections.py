"""How many queues of work CUDA makes for a GPU: set before anything initialises it, so this module imports no torch."""

import glob
import os
import re
from collections.abc import Sequence

_NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = re.compile(r"Blackwell|\bG?B[123]\d\d\b")
were_set = False


def set_connections(argv: Sequence[str], gpus: str = "/proc/driver/nvidia/gpus/*/information") -> None:
    """Where `argv`, or the recipe that it names, asks for tensor or context parallelism, let CUDA make one queue:
    before Blackwell, communication starts before the computation that it is to hide behind only if both are in one.
    With --overlap-moe-expert-parallel-comm, which needs several, and where the user has set the variable, nothing is
    done. Whether the command line is right is not looked at.

    Args:
        gpus: the driver's descriptions of this machine's GPUs.
    """
    global were_set
    if _NAME in os.environ or any(_BLACKWELL.search(_text(path)) for path in glob.glob(gpus)):
        return
    line = " ".join(argv)
    recipe = re.search(r"(?<!\S)--config[= ](\S+)", line)
    said = re.sub(r"#.*", "", _text(recipe[1]) if recipe else "").replace("_", "-") + " " + line
    sizes = dict(re.findall(r"(tensor-model|context)-parallel-size\W+(\d+)", said))
    if any(int(size) > 1 for size in sizes.values()) and "overlap-moe-expert-parallel-comm" not in said:
        os.environ[_NAME], were_set = "1", True


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
