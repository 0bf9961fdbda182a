"""What a model computes from a checkpoint, ours under a layer spec and a precision, or transformers': logits, losses,
every gradient by its Hugging Face name. Everything lands on the CPU in fp32, so that any two can be held against each
other."""

import dataclasses
import gc
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from model_weights import gather_from
from single_process import build, positions
from transformers import AutoModelForCausalLM

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.platform import device

# Proportions as published. The standard deviation keeps the scores of experts apart at the width.
SHAPES = {
    "tiny": {},
    "mid": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    | {
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "expert_hidden_dim": 256,
        "vocab_size": 8192,
    }
    | {"initializer_range": 0.03},
}
BATCH = {"tiny": (2, 64), "mid": (2, 512)}

LOCAL = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
LOCAL += " --no-gradient-accumulation-fusion --no-moe-grouped-gemm"
TE = "--transformer-impl transformer_engine"
TE_SEQUENTIAL = f"{TE} --no-moe-grouped-gemm"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`logits [b, s, v]`, `losses [b, s]`, gradients of the mean loss by Hugging Face name (fused layout)."""

    logits: torch.Tensor
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


def write_checkpoint(folder: Path, changes: dict) -> None:
    layers = changes.get("num_hidden_layers", TINY_CONFIG["num_hidden_layers"])
    # transformers ignores first_k_dense_replace: the layers must be named.
    config = HyConfig.from_dict(TINY_CONFIG | changes | {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)})
    write_tiny_checkpoint(folder, config, dtype="fp32")


def tokens_of(folder: str, batch: tuple[int, int]) -> torch.Tensor:
    """`[b, s + 1]`, without the padding token, whose embedding gets no gradient in transformers (padding_idx)."""
    vocabulary = HyConfig.from_dir(folder).pad_token_id
    return torch.randint(0, vocabulary, (batch[0], batch[1] + 1), generator=torch.Generator().manual_seed(0)).to(
        device.current()
    )


def ours(folder: str, flags: str, tokens: torch.Tensor) -> Outcome:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    wrapped = build(folder, *flags.split(), seq_length=inputs.shape[1]).train()
    for parameter in wrapped.parameters():
        # What Transformer Engine's fused products add to, as Megatron's DDP lays it out.
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    with torch.no_grad():
        logits = wrapped(inputs, positions(inputs), None)
    losses = wrapped(
        inputs, positions(inputs), None, labels=labels, loss_mask=torch.ones_like(labels, dtype=torch.float32)
    )
    losses.mean().backward()
    outcome = Outcome(_plain(logits), _plain(losses), gradients_of(wrapped, HyConfig.from_dir(folder)))
    forget()
    return outcome


def gradients_of(wrapped: torch.nn.Module, config: HyConfig) -> dict[str, torch.Tensor]:
    """By Hugging Face name: gather_from takes what lies in the parameters, and here the gradients do."""
    model = unwrap_model(wrapped)
    for parameter in model.parameters():
        gradient = parameter.main_grad if parameter.grad_added_to_main_grad else parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
    found = gather_from(config, [model], layout="fused")
    return {name: _plain(tensor) for name, tensor in found.items() if "e_score_correction_bias" not in name}


def theirs(folder: str, dtype: torch.dtype, tokens: torch.Tensor) -> Outcome:
    """transformers, with sdpa and its default way through the experts (grouped_mm where it can)."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        .to(device.current())
        .train()
    )
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs, use_cache=False).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    losses.mean().backward()
    gradients = {
        name: _plain(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    outcome = Outcome(_plain(logits), _plain(losses), gradients)
    del model, logits, losses
    forget()
    return outcome


def packed_losses(folder: str, flags: str, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Losses `[t]` of one packed sample `tokens [1, t + 1]` of sequences of these lengths."""
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=tokens.device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    restarting = torch.cat([torch.arange(length) for length in lengths])[None].to(tokens.device)
    model = build(folder, *flags.split(), seq_length=sum(lengths)).eval()
    with torch.no_grad():
        losses = model(tokens[:, :-1], restarting, None, labels=tokens[:, 1:], packed_seq_params=packed)
    return _plain(losses)[0]


def padded_losses(folder: str, flags: str, lengths: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """The same, each sequence alone in a row that is padded to the longest."""
    batch = torch.zeros(2, len(lengths), max(lengths), dtype=torch.int64, device=tokens.device)
    starts = list(itertools.accumulate([0, *lengths[:-1]]))
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for side, shift in enumerate((0, 1)):
            batch[side, row, :length] = tokens[0, start + shift : start + shift + length]
    model = build(folder, *flags.split(), seq_length=max(lengths)).eval()
    with torch.no_grad():
        losses = _plain(model(batch[0], positions(batch[0]), None, labels=batch[1]))
    return torch.cat([losses[row, :length] for row, length in enumerate(lengths)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


def errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative norms: of the logits, the losses, and each gradient by name."""
    assert found.gradients.keys() == expected.gradients.keys()
    gradients = {name: relative(found.gradients[name], gradient) for name, gradient in expected.gradients.items()}
    return {
        "logits": relative(found.logits, expected.logits),
        "losses": relative(found.losses, expected.losses),
    } | gradients


def all_gradients(outcome: Outcome) -> torch.Tensor:
    """Every gradient, one after the other, in the order of names."""
    return torch.cat([outcome.gradients[name].flatten() for name in sorted(outcome.gradients)])


def forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()
