"""Where hymeg runs: the one place that knows of CPU, gloo and Megatron's private names.

With CUDA some of Megatron's names change, too: a call that its wheel cannot serve and optimizers of nothing
(`hymeg.platform.megatron`), the losses of multi-token prediction (`hymeg.platform.mtp`), and how checkpoints are
written and read (`hymeg.platform.saving`).
Without CUDA, `install` makes unmodified megatron-core train on CPU over gloo. It must run before anything imports
Megatron: the packages that import it call it. `HYMEG_PLATFORM=cpu` forces the CPU, `HYMEG_PLATFORM=cuda` refuses to run
without a GPU; unset, the presence of CUDA decides.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from hymeg.errors import UserError
from hymeg.platform import connections

CHOICES = ("cpu", "cuda")
_name: str | None = None
_elsewhere = False


def name() -> str:
    """`"cpu"` or `"cuda"`: decided at the first call and the same ever after.

    Raises:
        UserError: `HYMEG_PLATFORM` holds something else, or asks for CUDA where there is none.
    """
    global _name
    if _name is None:
        wanted = os.environ.get("HYMEG_PLATFORM", "")
        if wanted not in ("", *CHOICES):
            raise UserError(
                f"HYMEG_PLATFORM is {wanted!r}; allowed are 'cpu' and 'cuda'. Unset it to let the machine decide."
            )
        if wanted == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        has_cuda = torch.cuda.is_available()
        if wanted == "cuda" and not has_cuda:
            raise UserError(
                "HYMEG_PLATFORM=cuda, but torch sees no CUDA device here. Check nvidia-smi and CUDA_VISIBLE_DEVICES, "
                "or unset HYMEG_PLATFORM."
            )
        _name = "cuda" if has_cuda else "cpu"
    return _name


def is_cpu() -> bool:
    return name() == "cpu"


@contextlib.contextmanager
def for_gpus() -> Iterator[None]:
    """While the context is open, flags are judged as on a machine with CUDA: they are a plan's or a recipe's, to run
    elsewhere.
    """
    global _elsewhere
    _elsewhere = True
    try:
        yield
    finally:
        _elsewhere = False


def judged_for_cpu() -> bool:
    return is_cpu() and not _elsewhere


def announcement() -> list[str]:
    """What a run is told once, at its start, of where it runs."""
    if is_cpu():
        return ["no CUDA: training on CPU over gloo, with --transformer-impl local, fusions off, no grouped GEMM"]
    if connections.were_set:
        return ["CUDA_DEVICE_MAX_CONNECTIONS=1 set: tensor and context parallelism need it on GPUs before Blackwell"]
    return []


def transformer_overrides() -> dict[str, bool]:
    """Fields of Megatron's TransformerConfig that no flag sets."""
    # Over gloo a freed output may still be on its way: wrong losses under interleaved stages, and no error.
    return {"deallocate_pipeline_outputs": False} if is_cpu() else {}


_installed = False


def install() -> None:
    """Make this process ready for Megatron: names are replaced as modules are imported. Idempotent.

    Raises:
        RuntimeError: Megatron was imported before (its modules have already bound the names that need replacing), or a
            patch target is gone.
    """
    global _installed
    if _installed:
        return
    if is_cpu():
        if "megatron.core" in sys.modules:
            raise RuntimeError("hymeg.platform.install() must run before anything imports megatron")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        # Where they are installed Megatron uses them, local spec or not, and they have kernels for CUDA only.
        for package in ("transformer_engine", "apex"):
            sys.modules.setdefault(package, None)
        from hymeg.platform import gloo, torch_cuda  # noqa: F401
    _installed = True
    _quieten()
    from hymeg.platform import megatron, mtp, saving  # noqa: F401

    if is_cpu():
        from hymeg.platform import on_cpu  # noqa: F401


def _quieten() -> None:
    """Before Megatron is imported: on a CPU it warns a dozen times of what is as it should be."""
    messages = [r"`torch.distributed.\w+` is deprecated", "MimoModelConfig is experimental"]
    if is_cpu():
        messages += [
            "Transformer Engine and Apex are not installed",
            "Apex is not installed",
            "Only transformer-engine",
            "'pin_memory' argument is set",
        ]
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # The device's generator is the CPU's, so that both change together.
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
            lambda record: "CPU RNG state changed" not in record.getMessage()
        )
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
