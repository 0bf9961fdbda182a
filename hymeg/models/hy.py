"""The model, and the one function that constructs it.

It is Megatron's GPTModel. Megatron 0.19 calls it deprecated in favour of HybridModel, which has no schedule for
expert-parallel overlap yet and forbids pipeline layouts; the stored keys are the same. Nothing outside `construct` may
depend on the class.
"""

import contextlib
import dataclasses
import functools
import logging
from typing import ClassVar

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from hymeg.models.head import Head, PendingLogits
from hymeg.models.specs import decoder_spec, mtp_spec, uses_transformer_engine
from hymeg.platform import device
from hymeg.platform.patches import patched

logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
    lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
)


@dataclasses.dataclass
class HyTransformerConfig(TransformerConfig):
    """Megatron's configuration and what these models add to it."""

    hy_lm_head_fp32: bool = False
    """Logits in fp32 from weights of a lower precision (config.json: enable_lm_head_fp32)."""
    hy_recompute_logits: bool = False
    """Compute the logits a second time in the backward pass instead of keeping their exponentials
    (--recompute-logits).
    """


class HYV3ForCausalLM(GPTModel):
    """Hy3 and Hy-MT2: the trunk, and multi-token-prediction layers where config.json has any.

    `forward(input_ids, position_ids, attention_mask, labels=None, loss_mask=None, packed_seq_params=None,
    padding_mask=None)` takes `[b, s]`, or `[1, t]` with `packed_seq_params`, `padding_mask` where experts are not to be
    counted, and returns logits `[b, s, padded_vocab / tp]`, or the loss of every token `[b, s]` when labels are given;
    every pipeline stage but the last returns hidden states `[s, b, h]`.
    """

    def __init__(
        self,
        config: HyTransformerConfig,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        vp_stage: int | None = None,
        **kwargs,
    ):
        head = functools.partial(Head, vocab_size=vocab_size)
        with patched(tensor_parallel, "ColumnParallelLinear", head, "gpt_model.py:266: the output layer"):
            super().__init__(
                config=config,
                transformer_layer_spec=decoder_spec(config, vp_stage),
                mtp_block_spec=mtp_spec(config, vp_stage),
                vocab_size=padded_vocab_size,
                vp_stage=vp_stage,
                **kwargs,
            )
        if self.post_process and not isinstance(self.output_layer, Head):
            raise RuntimeError(
                f"the output layer is a {type(self.output_layer).__name__}: its logits would not be ours"
            )
        # Megatron does so only when EP > 1. Without the mark it reduces their gradients over the wrong group when TP >
        # ETP, and the optimizer keeps one state where EP > 1 has two, so that neither loads the other's.
        for name, parameter in self.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False
        if self.mtp_process and config.mtp_loss_scaling_factor == 0:
            self.mtp.requires_grad_(False)
        self.adapters: torch.nn.ModuleDict | None = None  # hymeg.models.lora
        self.trained_in_full: dict[str, str] = {}  # beside adapters: stored key of the weight -> in their checkpoint
        self.register_load_state_dict_post_hook(_allow_missing)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        with contextlib.nullcontext() if uses_transformer_engine(self.config) else device.unwatched():
            return super().forward(*args, **kwargs)

    def _preprocess(self, *args, padding_mask: torch.Tensor | None = None, **kwargs) -> tuple:
        """Under sequence parallelism each rank's experts see a piece of the sequence: so the mask `[b, s]` is cut.
        Megatron does that on the first pipeline stage only.
        """
        with device.watched():  # rope_utils.py:62 pins memory
            made = super()._preprocess(*args, **kwargs)
        if padding_mask is not None and self.config.sequence_parallel:
            tp = self.pg_collection.tp
            padding_mask = padding_mask.chunk(tp.size(), dim=1)[tp.rank()].contiguous()
        return (*made[:5], padding_mask, *made[6:])

    def _postprocess(self, *args, labels=None, **kwargs):
        """Where only losses are asked for, the head makes no logits, unless a fused cross entropy of Megatron's is to
        have them.
        """
        if not self.post_process:
            return super()._postprocess(*args, labels=labels, **kwargs)
        self.output_layer.wants_losses = not (
            labels is None or self.config.cross_entropy_loss_fusion or kwargs.get("output_processor") is not None
        )
        try:
            return super()._postprocess(*args, labels=labels, **kwargs)
        finally:
            self.output_layer.wants_losses = False

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor | PendingLogits) -> torch.Tensor:
        """Losses `[b, s]` of the labels `[b, s]`, from logits `[s, b, padded_vocab / tp]` or what stands for them."""
        if isinstance(logits, PendingLogits):
            return logits.cross_entropy(labels.t()).t().contiguous()
        return super().compute_language_model_loss(labels, logits)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """What a distributed checkpoint holds: of a model with adapters what is trained, under the names of
        `hymeg.checkpoint.adapter_table`; of any other the weights."""
        if self.adapters is None:
            return self.weights_sharded_state_dict(prefix, sharded_offsets, metadata)
        found = {
            name: tensor
            for path, adapter in self.adapters.items()
            for name, tensor in adapter.sharded_state_dict(f"{prefix}adapters.{path}.").items()
        }
        weights = self.weights_sharded_state_dict(prefix, sharded_offsets, metadata) if self.trained_in_full else {}
        for name, tensor in weights.items():
            if tensor.key in self.trained_in_full:
                found[name] = dataclasses.replace(tensor, key=self.trained_in_full[tensor.key])
        return found

    def weights_sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weights, without adapters: tensors only, the same under both layer specs and from the converter.
        Megatron would add an object `_extra_state` for every linear layer, every expert and each of Transformer
        Engine's norms, and refuse to load a checkpoint without them; they are empty but where quantization keeps a
        state: FP8's delayed scaling a history of maxima, a custom recipe perhaps something
        (transformer_engine/pytorch/_extra_state.py)."""
        state_dict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        config = self.config
        keeps_state = (config.fp8 and config.fp8_recipe in ("delayed", "custom")) or (
            config.fp4 and config.fp4_recipe == "custom"
        )
        return {
            key: value
            for key, value in state_dict.items()
            if not key.startswith(f"{prefix}adapters.") and (keeps_state or "._extra_state" not in key)
        }


def _allow_missing(model: torch.nn.Module, incompatible_keys) -> None:
    """What `sharded_state_dict` leaves out, a strict `load_state_dict` does not miss."""
    incompatible_keys.missing_keys[:] = [
        key
        for key in incompatible_keys.missing_keys
        if not key.endswith("._extra_state") and (model.adapters is None or key.startswith("adapters."))
    ]


@dataclasses.dataclass(kw_only=True)
class HyModelConfig(GPTModelConfig):
    """What Megatron's training loop is given to build the model from."""

    builder: ClassVar[str] = "hymeg.models.hy.HyModelBuilder"


class HyModelBuilder(GPTModelBuilder):
    """Megatron's builder, constructing our models."""

    def build_model(self, *args, **kwargs) -> HYV3ForCausalLM:
        return construct(self._model_config, *args, **kwargs)


def construct(
    config: HyModelConfig,
    pg_collection: ProcessGroupCollection,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
) -> HYV3ForCausalLM:
    """The one place where a model is constructed.

    Args:
        config: sizes and layout; `vocab_size` is the checkpoint's, padded here to divide by the tensor-parallel size.
        pre_process, post_process: whether the stage holds the embedding and the head; None asks the pipeline groups.
    """
    transformer = config.transformer
    vp_size = transformer.virtual_pipeline_model_parallel_size
    if pre_process is None:
        pre_process = is_vp_first_stage(vp_stage=vp_stage, vp_size=vp_size) and is_pp_first_stage(pg_collection.pp)
    if post_process is None:
        post_process = is_vp_last_stage(vp_stage=vp_stage, vp_size=vp_size) and is_pp_last_stage(pg_collection.pp)
    return HYV3ForCausalLM(
        config=transformer,
        vocab_size=config.vocab_size,
        padded_vocab_size=calculate_padded_vocab_size(
            config.vocab_size,
            config.make_vocab_size_divisible_by,
            transformer.tensor_model_parallel_size,
            logging_enabled=False,
        ),
        max_sequence_length=config.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=config.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
