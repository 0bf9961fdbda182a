"""Megatron's own names that only the CPU needs changed. Importing this module replaces them; line numbers are
megatron-core 0.19.2's.
"""

import functools
import types

import torch
import torch.nn.functional as F
from megatron.core import optimizer, utils
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.moe import token_dispatcher
from megatron.training import initialize, training

from hymeg.platform.adam import FusedAdam
from hymeg.platform.kernels import chunks_of_rank
from hymeg.platform.patches import patch, replaces

_initialize = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
patch(training, "initialize_megatron", _initialize, "initialize.py:66 asserts torch.cuda.is_available()")
patch(initialize, "_warmup_jit_function", lambda tp_size: None, "initialize.py:497 warms up kernels by whole layers")
_LAYOUT = "distrib_optimizer.py:837, 851, 874, 1025: the step lies in the parameter group; torch's layout cannot resume"
patch(optimizer, "Adam", FusedAdam, "optimizer/__init__.py:560")
patch(optimizer, "USING_PYTORCH_OPTIMIZER", False, "optimizer/__init__.py:556")
patch(distrib_optimizer, "HAVE_APEX_OR_TE", True, _LAYOUT)
patch(distrib_optimizer, "USING_APEX_OPTIMIZER", True, _LAYOUT)


def _indices_of_rank(cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """The tokens of rank `cp_rank`, `[num_tokens / cp_size]`."""
    return torch.cat([torch.arange(*chunk) for _, *chunk in chunks_of_rank(cu_seqlens.tolist(), cp_size, cp_rank)])


_kernels = types.SimpleNamespace(thd_get_partitioned_indices=_indices_of_rank)
patch(utils, "tex", _kernels, "core/utils.py:2441 slices packed sequences with Transformer Engine's kernel")

_SWIGLU = "fused_bias_swiglu.py:54, 74: written to be compiled, they pass over their tensors a dozen times"


@replaces(fused_bias_swiglu, "swiglu_back", _SWIGLU)
def _swiglu_back(swiglu_back, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _gradient_of_swiglu(g, y, F.silu(y.chunk(2, -1)[0]))


@replaces(fused_bias_swiglu, "weighted_swiglu_back", _SWIGLU)
def _weighted_swiglu_back(weighted_swiglu_back, g: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> tuple:
    gate, up = y.chunk(2, -1)
    activated = F.silu(gate)
    of_weights = (activated * up * g.to(weights.dtype)).sum(-1, keepdim=True)
    return _gradient_of_swiglu(g * weights, y, activated).to(y.dtype), of_weights


def _gradient_of_swiglu(g: torch.Tensor, y: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
    """By `y`, gate and up; `activated` is the gate's silu."""
    gate, up = y.chunk(2, -1)
    found = torch.empty(y.shape, dtype=g.dtype)
    of_gate, of_up = found.chunk(2, -1)
    torch.ops.aten.silu_backward(g * up, gate.to(g.dtype), grad_input=of_gate)
    torch.mul(g, activated, out=of_up)
    return found


@replaces(token_dispatcher, "sort_chunks_by_idxs", "token_dispatcher.py:775, 810: copies what is in order, too")
def _sort_chunks(sort_chunks_by_idxs, tokens, split_sizes, order, probs=None, fused=False):
    """Where a rank has all experts, tokens are where they belong."""
    if order.tolist() == list(range(len(order))):
        return tokens, probs
    return sort_chunks_by_idxs(tokens, split_sizes, order, probs, fused)
