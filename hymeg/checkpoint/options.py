"""What a conversion can be asked for: each argument said once, for all functions that take it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymeg.checkpoint.workers import check_num_workers
from hymeg.errors import UserError
from hymeg.hf.dtypes import ROUNDED_TO
from hymeg.hf.safetensors_files import MAX_SHARD_BYTES, files_by_tensor

Say = Callable[[str], None]

# Which fields of `Options` go together: those of every conversion, of one that can be verified, of one that reads whole
# models, of one that reads a distributed one, of one that writes a Hugging Face folder, and in which ways.
ANY = ("dtype", "workers", "overwrite")
VERIFIED = (*ANY, "verify")
OF_MODEL = (*VERIFIED, "base_hf", "drop_mtp")
FROM_DIST = ("iteration", "cut_vocabulary", "keep_vocabulary")
TO_HF = ("layout", "max_shard_bytes")
ANEW = (*TO_HF, "shards_like", "quantize", "scales_from")


@dataclass(frozen=True, kw_only=True)
class Options:
    dtype: str = "keep"  # "bf16", "fp32" or "keep". The expert bias is always fp32
    workers: int = 2  # number of processes
    overwrite: bool = False  # replace what an earlier conversion wrote
    verify: bool = False  # read everything back from the disk and compare it, before the folder appears
    say: Say = lambda line: None  # is given lines for the user
    # The Hugging Face folder that training began with. From it comes what is not there: MTP layers, and, of a
    # distributed checkpoint, config.json and the tokenizer.
    base_hf: str | Path | None = None
    drop_mtp: bool = False  # leave the MTP layers out
    iteration: int | None = None  # of a distributed checkpoint; None: the one that the tracker names
    # Rows of embedding and output layer beyond the config's vocabulary may hold numbers, which are lost. (Zeros are
    # padding, and always cut.)
    cut_vocabulary: bool = False
    keep_vocabulary: bool = False  # they are kept instead, padding included, and counted in config.json
    layout: str = "hub"  # the published names; or "fused", transformers' names in memory
    max_shard_bytes: int = MAX_SHARD_BYTES  # for each safetensors file
    # A Hugging Face folder; every tensor goes into the file that it has there, whatever the size.
    shards_like: str | Path | None = None
    # "fp8": Linears in FP8, in Tencent's form, with new scales; in the layout "hub" only. `dtype` is then of the rest.
    quantize: str | None = None
    # For "fp8", the published FP8 folder whose scales of inputs and of the KV cache go along, and which says which
    # weights are in FP8. None: config.json tells engines to scale inputs as they come.
    scales_from: str | Path | None = None

    @classmethod
    def taken(cls, names: tuple[str, ...], given: Mapping[str, Any]) -> "Options":
        """Those given. Raises TypeError where one of them is neither `say` nor among `names`, the function's own."""
        for name in given:
            if name not in (*names, "say"):
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        return cls(**given)

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

    @property
    def base(self) -> Path | None:
        return None if self.base_hf is None else Path(self.base_hf)

    @property
    def sharding(self) -> int | dict[str, str]:
        """The most bytes for a file, or the file of each tensor by its name."""
        return self.max_shard_bytes if self.shards_like is None else files_by_tensor(self.shards_like)
