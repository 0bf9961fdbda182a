"""What a conversion can be asked for: each argument said once, for all functions that take it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hymeg.checkpoint.workers import check_num_workers
from hymeg.errors import UserError
from hymeg.hf.dtypes import ROUNDED_TO
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, files_by_tensor

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of every conversion. What some cannot be asked for is a constant here, and a field below."""

    dtype: str = "keep"  # "bf16", "fp32" or "keep". The expert bias is always fp32
    workers: int = 2  # number of processes
    overwrite: bool = False  # replace what an earlier conversion wrote
    say: Say = lambda line: None  # is given lines for the user
    verify = cut_vocabulary = keep_vocabulary = False
    shards_like = quantize = scales_from = None

    def __post_init__(self) -> None:
        check_num_workers(self.workers)
        assert self.dtype in ROUNDED_TO and self.quantize in (None, "fp8")
        if self.cut_vocabulary and self.keep_vocabulary:
            raise UserError("--cut-vocabulary and --keep-vocabulary contradict each other; give one of them")
        if self.scales_from and not self.quantize:
            raise UserError(f"--scales-from {self.scales_from}: scales are those of FP8; give --quantize fp8 as well")
        if self.quantize and self.layout != "hub":
            given = f"--quantize {self.quantize} --layout {self.layout}"
            raise UserError(f"{given}: no engine reads it; --layout hub is needed")

    @property
    def rounded_to(self) -> str | None:
        return ROUNDED_TO[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Verified(Options):
    """Of what makes models, or adapters in training's form."""

    verify: bool = False  # read everything back from the disk and compare it, before the folder appears


@dataclass(frozen=True, kw_only=True)
class OfModel(Verified):
    """Of what reads whole models."""

    # The Hugging Face folder that training began with. From it comes what is not there: MTP layers, and, of a
    # distributed checkpoint, config.json and the tokenizer.
    base_hf: str | Path | None = None
    drop_mtp: bool = False  # leave the MTP layers out

    @property
    def base(self) -> Path | None:
        return None if self.base_hf is None else Path(self.base_hf)


@dataclass(frozen=True, kw_only=True)
class FromDist(OfModel):
    """Of what reads one distributed checkpoint; its vocabulary may have more rows than config.json counts tokens."""

    cut_vocabulary: bool = False  # they may hold numbers, which are lost. (Zeros are padding, and always cut.)
    keep_vocabulary: bool = False  # they are kept instead, padding included, and counted in config.json


@dataclass(frozen=True, kw_only=True)
class ToHf(Verified):
    """Of what writes a Hugging Face folder."""

    layout: str = "hub"  # the published names; or "fused", transformers' names in memory
    max_shard_bytes: int = MAX_SHARD_BYTES  # for each safetensors file

    @property
    def sharding(self) -> int | dict[str, str]:
        """The most bytes for a file, or the file of each tensor by its name."""
        return self.max_shard_bytes if self.shards_like is None else files_by_tensor(self.shards_like)


@dataclass(frozen=True, kw_only=True)
class Average(OfModel, ToHf):
    """Of a mean; `layout` and `max_shard_bytes` are of one that becomes a Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class HfToHf(OfModel, ToHf):
    """Of a model written anew as a Hugging Face folder."""

    # A Hugging Face folder; every tensor goes into the file that it has there, whatever the size.
    shards_like: str | Path | None = None
    # "fp8": Linears in FP8, in Tencent's form, with new scales; in the layout "hub" only. `dtype` is then of the rest.
    quantize: str | None = None
    # For "fp8", the published FP8 folder whose scales of inputs and of the KV cache go along, and which says which
    # weights are in FP8. None: config.json tells engines to scale inputs as they come.
    scales_from: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class DistToHf(FromDist, HfToHf):
    """As `HfToHf`, of a distributed checkpoint."""
