"""Which Hugging Face tensor lies where in which distributed (Megatron torch_dist) tensor: one table.

Import, export, comparison, the in-memory adapter and the parameter count all read it. Names, shapes and slices only: no
torch, no files, no bytes. To add a tensor, add a row.

Hugging Face checkpoints come in two layouts, told apart by their names. "hub" is what the published files and
`save_pretrained` hold: one tensor per expert. "fused" is what transformers (from 5.6 on) holds in memory: the experts
of a layer stacked. Distributed keys are those of a GPTModel whose `moe_layer_freq` is a list (layers not stacked), as
megatron-core 0.19.2 stores them.
"""

import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

HF_LAYOUTS = ("hub", "fused")
NUM_LISTED = 10  # tensors that a message names, of each kind

Shape = tuple[int, ...]
Range = tuple[int, int]


class Place(NamedTuple):
    """Where a tensor of `hf_shape` lies in one of `dist_shape`, which is seen as a matrix [rows, columns] (a vector as
    one row): its elements are those of the row ranges [start, stop), in this order.
    """

    hf_shape: Shape
    dist_shape: Shape
    rows: tuple[Range, ...]

    def in_stack(self, index: int, count: int) -> "Place":
        """The same in slice `index` of `count` such distributed tensors, stacked along a new first axis."""
        first = index * num_rows(self.dist_shape)
        rows = tuple((first + start, first + stop) for start, stop in self.rows)
        return Place(self.hf_shape, (count, *self.dist_shape), rows)


def num_rows(shape: Shape) -> int:
    return math.prod(shape[:-1])


def row_ranges(shape: Shape, offset: Shape, extent: Shape) -> list[Range]:
    """The rows of the block of `extent` at `offset`, where shape is [columns], [rows, columns] or [slices, rows,
    columns].
    """
    if len(shape) == 1:
        return [(0, 1)]
    height, (first, length) = (shape[-2], (offset[-2], extent[-2]))
    slices = range(offset[0], offset[0] + extent[0]) if len(shape) == 3 else (0,)
    if length == height:
        return [(slices[0] * height, (slices[-1] + 1) * height)]
    return [(i * height + first, i * height + first + length) for i in slices]


def with_first_rows(ranges: Iterable[Range]) -> Iterator[tuple[int, int, int]]:
    """The start and the end of each range, and how many rows the ranges before it have."""
    row = 0
    for start, stop in ranges:
        yield start, stop, row
        row += stop - start


# ---- how: the ways a Hugging Face tensor can lie in a distributed one. A size is a field of HyConfig or a product of
# some: "2*hidden_size".


def _size(config: HyConfig, name: str) -> int:
    return math.prod(int(factor) if factor.isdigit() else getattr(config, factor) for factor in name.split("*"))


class Whole:
    """The distributed tensor is the Hugging Face tensor."""

    def __init__(self, *shape: str):
        self.shape = shape

    def place(self, config: HyConfig) -> Place:
        shape = tuple(_size(config, name) for name in self.shape)
        return Place(shape, shape, ((0, num_rows(shape)),))


class Fp32Buffer(Whole):
    """As `Whole`, and kept in fp32 whatever the training dtype; no parameter: the optimizer does not see it."""


@dataclass(frozen=True)
class GateUp:
    """Half of a gate-up matrix [2 * width, hidden]: the gate is half 0 (rows 0 to width), the up projection half 1."""

    half: int
    width: str

    def place(self, config: HyConfig) -> Place:
        width, hidden = _size(config, self.width), config.hidden_size
        return Place((width, hidden), (2 * width, hidden), ((self.half * width, (self.half + 1) * width),))


@dataclass(frozen=True)
class QKV:
    """The query, key or value heads in Megatron's `linear_qkv` [(heads + 2 * kv_heads) * head_dim, hidden], whose rows
    are, for each KV head, those of its query heads, its key, its value."""

    part: str  # "q", "k" or "v"

    def place(self, config: HyConfig) -> Place:
        groups, head, hidden = config.num_key_value_heads, config.head_dim, config.hidden_size
        q = config.num_attention_heads // groups * head
        first, length = {"q": (0, q), "k": (q, head), "v": (q + head, head)}[self.part]
        height = q + 2 * head  # rows for each KV head
        rows = tuple((start, start + length) for start in range(first, groups * height, height))
        return Place((groups * length, hidden), (groups * height, hidden), rows)


# ---- the table


class Row(NamedTuple):
    layouts: tuple[str, ...]
    hf: str  # below the scope's prefix; {e}: over the experts, which the distributed tensor holds as its first axis
    dist: str  # below the scope's prefix; DROPPED: accepted on reading, not imported
    how: Whole | GateUp | QKV
    when: str = ""  # the field of HyConfig without which there is no such tensor
    is_older: bool = False  # an older name of another row's tensor: accepted on reading, never written


both, hub, fused = (functools.partial(Row, layouts) for layouts in (HF_LAYOUTS, HF_LAYOUTS[:1], HF_LAYOUTS[1:]))
older = functools.partial(both, is_older=True)
DROPPED = ""
VOCAB, HIDDEN, HEAD, HEADS = "vocab_size", "hidden_size", "head_dim", "num_attention_heads*head_dim"
FFN, SHARED, EXPERT = "intermediate_size", "shared_expert_intermediate_size", "moe_intermediate_size"
E, GATE_UP, BIAS = "num_experts", "2*moe_intermediate_size", "moe_router_enable_expert_bias"

# fmt: off
TABLE: dict[str, tuple[Row, ...]] = {}
TABLE["model"] = (  # no prefix
    both("model.embed_tokens.weight", "embedding.word_embeddings.weight", Whole(VOCAB, HIDDEN)),
    both("model.norm.weight",         "decoder.final_layernorm.weight",   Whole(HIDDEN)),
    both("lm_head.weight",            "output_layer.weight",              Whole(VOCAB, HIDDEN)),
)
TABLE["layer"] = (  # model.layers.{l}, decoder.layers.{l}
    both("input_layernorm.weight",  "self_attention.linear_qkv.layer_norm_weight", Whole(HIDDEN)),
    both("self_attn.q_proj.weight", "self_attention.linear_qkv.weight",            QKV("q")),
    both("self_attn.k_proj.weight", "self_attention.linear_qkv.weight",            QKV("k")),
    both("self_attn.v_proj.weight", "self_attention.linear_qkv.weight",            QKV("v")),
    both("self_attn.q_norm.weight", "self_attention.q_layernorm.weight",           Whole(HEAD)),
    both("self_attn.k_norm.weight", "self_attention.k_layernorm.weight",           Whole(HEAD)),
    both("self_attn.o_proj.weight", "self_attention.linear_proj.weight",           Whole(HIDDEN, HEADS)),
)
TABLE["dense"] = (  # as "layer"
    both("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", Whole(HIDDEN)),
    both("mlp.gate_proj.weight",            "mlp.linear_fc1.weight",            GateUp(0, FFN)),
    both("mlp.up_proj.weight",              "mlp.linear_fc1.weight",            GateUp(1, FFN)),
    both("mlp.down_proj.weight",            "mlp.linear_fc2.weight",            Whole(HIDDEN, FFN)),
)
TABLE["moe"] = (  # as "layer"
    both( "post_attention_layernorm.weight",     "pre_mlp_layernorm.weight",              Whole(HIDDEN)),
    hub(  "mlp.router.gate.weight",              "mlp.router.weight",                     Whole(E, HIDDEN)),
    fused("mlp.gate.weight",                     "mlp.router.weight",                     Whole(E, HIDDEN)),
    older("mlp.gate.wg.weight",                  "mlp.router.weight",                     Whole(E, HIDDEN)),
    hub(  "mlp.expert_bias",                     "mlp.router.expert_bias",                Fp32Buffer(E), BIAS),
    fused("mlp.e_score_correction_bias",         "mlp.router.expert_bias",                Fp32Buffer(E), BIAS),
    hub(  "mlp.shared_mlp.gate_proj.weight",     "mlp.shared_experts.linear_fc1.weight",  GateUp(0, SHARED)),
    hub(  "mlp.shared_mlp.up_proj.weight",       "mlp.shared_experts.linear_fc1.weight",  GateUp(1, SHARED)),
    hub(  "mlp.shared_mlp.down_proj.weight",     "mlp.shared_experts.linear_fc2.weight",  Whole(HIDDEN, SHARED)),
    fused("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.linear_fc1.weight",  GateUp(0, SHARED)),
    fused("mlp.shared_experts.up_proj.weight",   "mlp.shared_experts.linear_fc1.weight",  GateUp(1, SHARED)),
    fused("mlp.shared_experts.down_proj.weight", "mlp.shared_experts.linear_fc2.weight",  Whole(HIDDEN, SHARED)),
    hub(  "mlp.experts.{e}.gate_proj.weight",    "mlp.experts.experts.linear_fc1.weight", GateUp(0, EXPERT)),
    hub(  "mlp.experts.{e}.up_proj.weight",      "mlp.experts.experts.linear_fc1.weight", GateUp(1, EXPERT)),
    hub(  "mlp.experts.{e}.down_proj.weight",    "mlp.experts.experts.linear_fc2.weight", Whole(HIDDEN, EXPERT)),
    fused("mlp.experts.gate_up_proj",            "mlp.experts.experts.linear_fc1.weight", Whole(E, GATE_UP, HIDDEN)),
    fused("mlp.experts.down_proj",               "mlp.experts.experts.linear_fc2.weight", Whole(E, HIDDEN, EXPERT)),
)
# An MTP layer is also a "layer" and a "moe", those two under mtp.layers.{i}.transformer_layer: its attribute is
# mtp_model_layer, but a GPTModel stores it under the older name (multi_token_prediction.py:1551). What is dropped,
# the publisher's own reader (vLLM's hy_v3_mtp) skips as well: the trunk's embedding and lm_head are used, and the
# norm before the head is final_layernorm.
TABLE["mtp"] = (  # model.layers.{num_hidden_layers + i}, mtp.layers.{i}
    both("enorm.weight",            "enorm.weight",           Whole(HIDDEN)),
    both("hnorm.weight",            "hnorm.weight",           Whole(HIDDEN)),
    both("eh_proj.weight",          "eh_proj.weight",         Whole(HIDDEN, "2*" + HIDDEN)),
    both("final_layernorm.weight",  "final_layernorm.weight", Whole(HIDDEN)),
    both("embed_tokens.weight",     DROPPED,                  Whole(VOCAB, HIDDEN)),
    both("shared_head.head.weight", DROPPED,                  Whole(VOCAB, HIDDEN)),
    both("shared_head.norm.weight", DROPPED,                  Whole(HIDDEN)),
)
# fmt: on

# Megatron pads their rows to a multiple of make_vocab_size_divisible_by * tensor_model_parallel_size; the surplus rows
# stand for no token.
VOCABULARY_KEYS = tuple(row.dist for row in TABLE["model"] if isinstance(row.how, Whole) and row.how.shape[0] == VOCAB)


class Entry(NamedTuple):
    """One Hugging Face tensor and its place: the elements of these rows of the distributed tensor, in this order.

    `dist_shape` counts the vocabulary without padding. Only q, k and v are more than one range of rows.
    """

    hf_name: str
    dist_key: str
    is_fp32_buffer: bool  # expert_bias: kept in fp32 whatever the training dtype, and no parameter
    hf_shape: Shape
    dist_shape: Shape
    rows: tuple[Range, ...]


class HFMatch(NamedTuple):
    """What `match_hf_tensors` found: entries under the names that the checkpoint uses, and the names of the copies that
    are not imported.
    """

    layout: str
    entries: list[Entry]
    dropped: list[str]


def hf_entries(config: HyConfig, layout: str) -> list[Entry]:
    """Every Hugging Face tensor of `layout` ("hub" or "fused") with its place. Together they fill every distributed
    tensor exactly once.
    """
    return [entry for row, entry in _expand(config, layout) if not row.is_older and row.dist != DROPPED]


def by_key(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each distributed tensor."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.dist_key, []).append(entry)
    return found


def distributed_shapes(config: HyConfig, padded_vocab_size: int | None = None) -> dict[str, Shape]:
    """Global shape of every distributed tensor, by key; the vocabulary's rows unpadded unless `padded_vocab_size` is
    given.
    """
    shapes = {entry.dist_key: entry.dist_shape for entry in hf_entries(config, "fused")}
    for key in VOCABULARY_KEYS:
        shapes[key] = (padded_vocab_size or config.vocab_size, *shapes[key][1:])
    return shapes


def num_parameters(config: HyConfig, include_expert_bias: bool = False) -> int:
    """Number of parameters, the vocabulary unpadded.

    The expert bias is a buffer and does not count, unless asked for. The two published counts of Hy3 differ in this:
    295,033,528,320 for the trunk is without it (as transformers counts parameters); 298,786,155,776 with MTP is every
    element in the checkpoint, the 15,360 biases included.
    """
    entries = hf_entries(config, "fused")
    return sum(math.prod(entry.hf_shape) for entry in entries if include_expert_bias or not entry.is_fp32_buffer)


def detect_layout(names: Iterable[str]) -> str:
    """The layout that `names` are in; "hub" where none of them tells (no MoE layer).

    Raises:
        UserError: some names are of the one layout and some of the other.
    """
    names = list(names)
    found = {layout: next(filter(marks.fullmatch, names), None) for layout, marks in _MARKS.items()}
    if all(found.values()):
        raise UserError(
            f"the Hugging Face tensors mix two layouts: {found['hub']} is a hub name, {found['fused']} a fused one; "
            "keep to one"
        )
    return "fused" if found["fused"] else "hub"


def match_hf_tensors(config: HyConfig, shapes: Mapping[str, Shape], is_part: bool = False) -> HFMatch:
    """Account for every tensor of a Hugging Face checkpoint, given the shapes by name.

    Args:
        is_part: of a model, such as a pipeline stage has: layers may be missing, whole.

    Raises:
        UserError: layouts are mixed; a tensor is missing, unexpected or of a wrong shape (one line: how many of each
            kind, and the first ten).
    """
    layout = detect_layout(shapes)
    # An older name only where today's is absent.
    candidates = sorted(_expand(config, layout), key=lambda pair: pair[0].is_older)
    found, dropped = {}, {}
    for row, entry in candidates:
        if entry.hf_name in shapes and row.dist == DROPPED:
            dropped[entry.hf_name] = entry.hf_shape
        elif entry.hf_name in shapes:
            found.setdefault(_place(entry), entry)
    wanted = [entry for row, entry in candidates if not row.is_older and row.dist != DROPPED]
    if is_part:
        held = {scope_of(key) for key, _ in found}
        wanted = [entry for entry in wanted if scope_of(entry.dist_key) in held]
    missing = [entry.hf_name for entry in wanted if _place(entry) not in found]
    known = {entry.hf_name: entry.hf_shape for entry in found.values()} | dropped
    account_for("the Hugging Face tensors", config, shapes, known, missing)
    return HFMatch(layout, [found[_place(entry)] for entry in wanted], list(dropped))


def _place(entry: Entry) -> tuple[str, Range]:
    return entry.dist_key, entry.rows[0]


def check_distributed_tensors(
    config: HyConfig, shapes: Mapping[str, Shape], required: Collection[str] | None = None
) -> None:
    """Account for the distributed tensors of a model, given the global shapes by key. Embedding and output layer may
    have padding rows.

    Args:
        required: the keys that must be among them, for a part of a model such as a pipeline stage. None: all.

    Raises:
        UserError: a tensor is missing, unexpected or of a wrong shape (one line, as for `match_hf_tensors`).
    """
    wanted = distributed_shapes(config)
    account_for("the distributed tensors", config, shapes, wanted, wanted if required is None else required)


def account_for(
    what: str,
    config: HyConfig,
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    required: Iterable[str],
    needed_by: str = "config.json",
) -> None:
    """Raise UserError where the shapes of tensors that were found, by name, are not those wanted, of which not all may
    be required: one line, how many are missing, unexpected and misshapen, and the first ten of each kind.
    """
    missing = [name for name in required if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} is {list(found[name])}, {list(shape)} is needed"
        for name, shape in wanted.items()
        if name in found and not fits(name, found[name], shape)
    ]
    told = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        more = f", and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
        told += [f"{len(names)} {kind} ({', '.join(names[:NUM_LISTED])}{more})"] if names else []
    advice = ""
    if not misshapen and all(is_mtp(config, name) for name in missing + unexpected):
        advice = (
            ". All belong to MTP layers: make num_nextn_predict_layers "
            f"({config.num_nextn_predict_layers} in config.json) agree with them"
        )
    if told:
        raise UserError(f"{what} are not those of {needed_by}: {'; '.join(told)}{advice}")


def scope_of(key: str) -> str:
    """What a pipeline stage holds whole or not at all: a layer; a distributed tensor outside the layers is its own."""
    return ".".join(key.split(".")[:3])


def fits(key: str, found: Shape, wanted: Shape) -> bool:
    """Whether a distributed tensor of shape `found` can stand where the unpadded shape is `wanted`: the same, or a
    vocabulary's with padding rows.
    """
    if key in VOCABULARY_KEYS and len(found) == len(wanted):
        wanted = (max(found[0], wanted[0]), *wanted[1:])
    return tuple(found) == wanted


def scopes(config: HyConfig) -> Iterator[tuple[str, str, str]]:
    """(scope of the table, Hugging Face prefix, distributed prefix) for everything that the model has."""
    yield "model", "", ""
    for layer in range(config.num_hidden_layers):
        prefixes = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        yield "layer", *prefixes
        yield "moe" if config.is_moe_layer(layer) else "dense", *prefixes
    for i, layer in enumerate(config.mtp_layer_indices):
        hf, dist = f"model.layers.{layer}.", f"mtp.layers.{i}."
        yield "mtp", hf, dist
        yield "layer", hf, f"{dist}transformer_layer."
        yield "moe", hf, f"{dist}transformer_layer."


def _expand(config: HyConfig, layout: str) -> Iterator[tuple[Row, Entry]]:
    """Every tensor that may stand in a checkpoint of `layout`, with its row."""
    if layout not in HF_LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed are {HF_LAYOUTS}")
    for scope, hf_prefix, dist_prefix in scopes(config):
        for row in TABLE[scope]:
            if layout not in row.layouts or (row.when and not getattr(config, row.when)):
                continue
            dist, place, is_fp32_buffer = dist_prefix + row.dist, row.how.place(config), isinstance(row.how, Fp32Buffer)
            for expert in range(config.num_experts) if "{e}" in row.hf else (None,):
                of_expert = place if expert is None else place.in_stack(expert, config.num_experts)
                hf = hf_prefix + row.hf.replace("{e}", str(expert))
                yield row, Entry(hf, dist, is_fp32_buffer, *of_expert)


def _marks(layout: str) -> re.Pattern:
    """Matches the names that only `layout` has."""
    rows = (row for scope in TABLE if scope != "model" for row in TABLE[scope] if row.layouts == (layout,))
    names = "|".join(re.escape(row.hf).replace(r"\{e\}", r"\d+") for row in rows)
    return re.compile(rf"model\.layers\.\d+\.(?:{names})")


_MARKS = {layout: _marks(layout) for layout in HF_LAYOUTS}


def is_mtp(config: HyConfig, name: str) -> bool:
    """Whether a Hugging Face tensor or a distributed one belongs to a multi-token-prediction layer."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.startswith("mtp.") or (layer is not None and int(layer[1]) >= config.num_hidden_layers)
