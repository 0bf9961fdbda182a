"""Numbers as bytes, from one dtype to another. Every way rounds once, to the nearest, ties to even.

FP8 becomes weights with its scales only, fp32(weight) * scale, and they FP8: `hymeg.hf.fp8` says which scale is whose.
"""

import functools
from collections.abc import Iterable

import numpy as np

_CACHED = 1 << 15  # so many fp32 numbers stay in a core's cache from one step to the next
E4M3_MAX = 448.0  # the largest number of E4M3


def converted(data: memoryview, found: str, wanted: str) -> memoryview:
    """The numbers in `data` in another dtype. dtypes are "BF16", "F16" or "F32"; `found` may be "F8_E4M3", too."""
    if found == wanted:
        return data
    if found == "BF16":
        numbers = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif found == "F8_E4M3":
        numbers = np.take(e4m3_numbers(), np.frombuffer(data, "u1"))
    else:
        numbers = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[found]).astype("<f4", copy=False)
    if wanted == "BF16":
        return memoryview(_bf16_bits(numbers)).cast("B")
    return memoryview(numbers.astype({"F16": "<f2", "F32": "<f4"}[wanted])).cast("B")


def as_fp32(data: memoryview, dtype: str) -> np.ndarray:
    return np.frombuffer(converted(data, dtype, "F32"), "<f4")


def common_dtype(dtypes: Iterable[str]) -> str:
    """That of all, or F32, which holds every other one exactly."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else "F32"


def _bf16_bits(numbers: np.ndarray) -> np.ndarray:
    bits = numbers.view("<u4")
    upper = _upper_halves(bits)
    if np.isnan(numbers).any():
        upper = np.where(np.isnan(numbers), (bits >> 16) | 0x40, upper).astype("<u2")
    return upper


def _upper_halves(bits: np.ndarray) -> np.ndarray:
    """Of fp32 numbers that are not NaN, rounded."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype("<u2")


@functools.cache
def e4m3_numbers() -> np.ndarray:
    """The fp32 number of each byte: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinity, 0x7F and
    0xFF are NaN. Source: "FP8 Formats for Deep Learning", arXiv 2209.05433, table 1.
    """
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[codes & 127 == 127] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype("<f4")


def e4m3_codes(numbers: np.ndarray) -> np.ndarray:
    """The byte of each fp32 number: the nearest, ties to even, and beyond E4M3_MAX that. NaN is 0x7F."""
    is_nan = np.isnan(numbers)
    magnitude = np.minimum(np.where(is_nan, np.float32(0), np.abs(numbers)), np.float32(E4M3_MAX))
    bits = magnitude.view("<u4")
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (127 - 7 << 3)  # 20 bits less mantissa, another bias
    below = np.rint(magnitude * np.float32(2.0**9)).astype("<u4")  # denormals are multiples of 2^-9
    codes = np.where(magnitude < np.float32(2.0**-6), below, normal) | np.signbit(numbers).astype("<u4") << 7
    return np.where(is_nan, 0x7F, codes).astype("u1")


def quantised(data: memoryview, found: str, scale: np.float32) -> np.ndarray:
    """The F8_E4M3 codes of the numbers in `data`, of dtype `found`, divided by `scale` in fp32."""
    if found == "BF16":
        return np.take(_codes_of_bf16(float(scale)), np.frombuffer(data, "<u2"), mode="clip")
    return e4m3_codes(as_fp32(data, found) / scale)


@functools.lru_cache(maxsize=4)
def _codes_of_bf16(scale: float) -> np.ndarray:
    """Of every bf16 number: to look them up takes a fraction of the time that computing does."""
    numbers = (np.arange(2**16, dtype="<u4") << 16).view("<f4")
    with np.errstate(all="ignore"):
        return e4m3_codes(numbers / np.float32(scale))


def dequantised(codes: memoryview, factors: np.ndarray, of_row: np.ndarray, wanted: str) -> memoryview:
    """fp32(codes) * factors in `wanted`, "BF16" or "F32".

    Args:
        codes: [rows, columns], F8_E4M3.
        factors: fp32, [n, columns], or [1, 1]: the same for all.
        of_row: [rows], ascending: which of the n are a row's.
    """
    if factors.size == 1:
        return memoryview(_looked_up(codes, factors.item(), wanted)).cast("B")
    rows = np.frombuffer(codes, np.int8).reshape(len(of_row), factors.shape[1])
    made = np.empty(rows.shape, {"BF16": "<u2", "F32": "<f4"}[wanted])
    height = max(_CACHED // factors.shape[1], 1)
    for number, factor in enumerate(factors):
        low, high = np.searchsorted(of_row, [number, number + 1])
        for start in range(low, high, height):
            part = slice(start, min(start + height, high))
            numbers = _e4m3_as_fp32(rows[part])
            with np.errstate(over="ignore"):
                numbers *= factor
            made[part] = _upper_halves(numbers.view("<u4")) if wanted == "BF16" else numbers
    if (nan := (rows & 0x7F) == 0x7F).any():
        made[nan] = {"BF16": 0x7FC0, "F32": np.nan}[wanted]
    return memoryview(made).cast("B")


def _e4m3_as_fp32(codes: np.ndarray) -> np.ndarray:
    """But for NaN: sign, exponent and mantissa moved to fp32's places are the number, less the difference of the
    exponents' biases, 7 and 127.
    """
    bits = codes.astype("<i4")  # of int8: the sign is in all upper bits
    bits <<= 20
    bits &= np.int32(-0x78100000)
    numbers = bits.view("<f4")
    numbers *= np.float32(2.0**120)
    return numbers


def _looked_up(codes: memoryview, scale: float, wanted: str) -> np.ndarray:
    pairs = np.frombuffer(bytes(codes) + b"\0" if len(codes) % 2 else codes, "<u2")
    numbers = np.take(_pairs(scale, wanted), pairs, mode="clip")  # no index is outside; "clip" is the faster way
    return numbers.view("<u2" if wanted == "BF16" else "<f4")[: len(codes)]


@functools.lru_cache(maxsize=4)
def _pairs(scale: float, wanted: str) -> np.ndarray:
    """What each two codes become together: to look both up takes hardly longer than one."""
    with np.errstate(over="ignore"):
        numbers = e4m3_numbers() * np.float32(scale)
    if wanted == "BF16":
        bits = _bf16_bits(numbers).astype("<u4")
        return (bits[:, None] << 16 | bits[None, :]).ravel()
    bits = numbers.view("<u4").astype("<u8")
    return (bits[:, None] << 32 | bits[None, :]).ravel()
