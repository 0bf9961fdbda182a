"""Transformer Engine without its compiled part: its own Python sources, under which a layer spec can be constructed,
saved and loaded on a CPU.

The sources are those of the `transformer-engine` wheel (environment.sh). What they import from the compiled
`transformer_engine_torch` is replaced here: enumerations whose numbers they use have the real ones, the versions they
ask for are a plausible build's, and every other name is a placeholder that may be imported, compared and written into
tables, and that raises when called. So names, shapes and classes of the modules are the real ones, and nothing can run.
"""

import enum
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import NoReturn

_NAME = "transformer_engine_torch"

_FORMATS = "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD BHSD"
_LAYOUTS = """
    SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D
    THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD
    Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD
    Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD
"""

# As Transformer Engine's C++ headers number them (transformer_engine.h, fused_attn.h, pytorch/csrc/common.h).
_ENUMERATIONS = {
    "DType": {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "FP8FwdTensors": {
        f"GEMM{gemm + 1}_{part}": 3 * gemm + i
        for gemm in range(3)
        for i, part in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
    },
    "FP8BwdTensors": {
        f"GRAD_{part}{gemm + 1}": 2 * gemm + i for gemm in range(3) for i, part in enumerate(("OUTPUT", "INPUT"))
    },
    "NVTE_QKV_Format": {f"NVTE_{name}": number for number, name in enumerate(_FORMATS.split())}
    | {"NVTE_QKV_Format_NOT_SET": 8},
    "NVTE_QKV_Layout": {f"NVTE_{name}": number for number, name in enumerate(_LAYOUTS.split())}
    | {"NVTE_QKV_Layout_NOT_SET": 26},
    "NVTE_Mask_Type": {
        f"NVTE_{name}MASK": number
        for number, name in enumerate(
            ("NO_", "PADDING_", "CAUSAL_", "PADDING_CAUSAL_", "CAUSAL_BOTTOM_RIGHT_", "PADDING_CAUSAL_BOTTOM_RIGHT_")
        )
    },
    "NVTE_Bias_Type": {"NVTE_NO_BIAS": 0, "NVTE_PRE_SCALE_BIAS": 1, "NVTE_POST_SCALE_BIAS": 2, "NVTE_ALIBI": 3},
    "NVTE_Softmax_Type": {"NVTE_VANILLA_SOFTMAX": 0, "NVTE_OFF_BY_ONE_SOFTMAX": 1, "NVTE_LEARNABLE_SOFTMAX": 2},
    "NVTERoutingMapFormat": {"BYTEMAP": 0, "BITMAP_U8": 1},
    "NVTE_Fused_Attn_Backend": {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
}
_VERSIONS = {"get_cublasLt_version": 130100, "get_cudnn_version": 92000, "get_num_cublas_streams": 4}

# Not called for our models, but looked up in tables, and imported by `import *`, which asks no `__getattr__`.
_LOOKED_UP = {"layernorm_fwd", "layernorm_bwd"}

_NUMBERS: dict[str, int] = {}


class _Placeholder(type):
    """The class of a name that nobody declared: a class itself, because the sources subscript, compare and annotate
    with such names.
    """

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _placeholder(f"{cls.__name__}.{name}")
        setattr(cls, name, member)
        return member

    def __int__(cls) -> int:
        """Of an enumeration's member: a number that no other has, though not the real one."""
        return _NUMBERS.setdefault(cls.__name__, len(_NUMBERS))

    def __call__(cls, *args, **kwargs) -> NoReturn:
        raise RuntimeError(
            f"{_NAME}.{cls.__name__} was called: the compiled part of Transformer Engine is only stood in for, nothing "
            "can run"
        )


def _placeholder(name: str) -> type:
    return _Placeholder(name, (), {"__module__": _NAME})


def _compiled_part(kernels: Mapping[str, Callable]) -> types.ModuleType:
    module = types.ModuleType(_NAME, "Stands in for the compiled part of Transformer Engine.")
    module.__file__ = __file__
    for name, members in _ENUMERATIONS.items():
        setattr(module, name, enum.IntEnum(name, members, module=_NAME))
    for name, version in _VERSIONS.items():
        setattr(module, name, lambda version=version: version)

    vars(module).update(kernels)
    for name in _LOOKED_UP - kernels.keys():
        setattr(module, name, _placeholder(name))

    def __getattr__(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(module, name, _placeholder(name))
        return getattr(module, name)

    module.__getattr__ = __getattr__
    return module


def install(kernels: Mapping[str, Callable] = types.MappingProxyType({})) -> None:
    """Make `import transformer_engine.pytorch` work in this process. Before anything imports Megatron, which looks for
    Transformer Engine once.

    Raises:
        ModuleNotFoundError: the wheel's sources, or the onnxscript they import, are not on the path.
        RuntimeError: Megatron was imported before.
    """
    if "megatron.core" in sys.modules:
        raise RuntimeError("stand_in.install() must run before anything imports megatron")
    sys.modules[_NAME] = _compiled_part(kernels)
    # Its own switch for a machine that only builds it: transformer_engine.common then looks for no libraries.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ.pop("NVTE_RELEASE_BUILD", None)
    with warnings.catch_warnings():
        # The package tries its PyTorch part as it is imported, finds no compiled module and goes on without.
        warnings.simplefilter("ignore", RuntimeWarning)
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
