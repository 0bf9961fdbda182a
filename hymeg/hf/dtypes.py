"""The dtypes of checkpoints: the one table of their names and sizes. As in safetensors, "BF16", everywhere in hymeg."""

from typing import NamedTuple

ITEM_SIZES = {  # bytes for one element
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Names(NamedTuple):
    """What others call a dtype of weights."""

    torch: str  # and config.json
    storage: str  # torch's class, as stored tensors name it


WEIGHTS = {
    "BF16": Names("bfloat16", "BFloat16Storage"),
    "F16": Names("float16", "HalfStorage"),
    "F32": Names("float32", "FloatStorage"),
}
# --dtype -> what weights are rounded to. Not fp16, in which large ones would become infinite.
ROUNDED_TO = {"keep": None, "bf16": "BF16", "fp32": "F32"}
