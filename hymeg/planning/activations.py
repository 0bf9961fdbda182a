"""Bytes that autograd keeps from a micro-batch's forward pass until its backward pass, by formula. docs/planning.md
derives every term.

Two layer specs save different tensors. The local spec (CPU) is held within 10 % of what was measured, setting by
setting. Transformer Engine's (GPU) is read from the sources of megatron-core 0.19.2 and transformer-engine 2.20.2; no
GPU has confirmed it yet.

Notation, as in the docs: T tokens of a rank (micro-batch x sequence / CP), Ts those of its sequence-parallel share (T /
TP), a bytes of an activation, H hidden, q and kv the widths of query and key heads, n and g their numbers, k experts
per token, I and Is widths of an expert and of the shared one, F of the dense MLP, E experts, V rows of the vocabulary.
Widths below are a rank's own (q / TP and so on).
"""

from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.parameters import layer_adapters, padded_vocab_size
from hymeg.planning.settings import Settings
from hymeg.planning.stages import Chunk

SLICE_ELEMENTS = {"local": 2**22, "transformer_engine": 2**26}
"""Logits that hymeg.models.linear_cross_entropy computes at a time, on CPU and on CUDA."""
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_RECOMPUTED = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


class Activations:
    """Bytes of one micro-batch on one rank.

    Args:
        imbalance: tokens of the busiest expert-parallel rank over the mean.
    """

    def __init__(self, config: HyConfig, layout: Layout, settings: Settings, imbalance: float = 1.0):
        self.config, self.settings = config, settings
        self.is_local = settings.transformer_impl == "local"
        self.slice = SLICE_ELEMENTS[settings.transformer_impl]
        self.a, tp = settings.element, layout.tp
        self.tokens = layout.micro_batch_size * layout.seq_length // layout.cp
        self.positions = layout.seq_length // layout.cp
        self.shared_tokens = self.tokens / tp
        # With one expert-parallel rank every token stays on it, wherever the router sends it.
        imbalance = imbalance if layout.ep > 1 else 1.0
        self.expert_tokens = self.shared_tokens * config.num_experts_per_tok * layout.etp * imbalance
        self.heads, self.groups = config.num_attention_heads / tp, config.num_key_value_heads / tp
        self.q, self.kv = self.heads * config.head_dim, self.groups * config.head_dim
        self.dense, self.shared = config.intermediate_size / tp, config.shared_expert_intermediate_size / tp
        self.expert = config.moe_intermediate_size / layout.etp
        rows = padded_vocab_size(config, layout, settings) / tp
        self.vocab_parameters = rows * config.hidden_size
        self.vocab = min(config.vocab_size, rows)  # rows that stand for tokens
        self.recomputes = {name: name in settings.recompute_modules for name in _RECOMPUTED}
        # An MTP layer counts as one of the trunk's.
        kinds = set(config.mlp_layer_types) if settings.lora_targets else ()
        adapted = (layer_adapters(config, settings.lora_targets, kind) for kind in kinds)
        self.adapted = {module.target for modules in adapted for module in modules}
        self._layers: dict[bool, float] = {}

    # ---- a virtual stage

    def saved(self, chunk: Chunk) -> float:
        """Of one micro-batch, from its forward pass to its backward pass."""
        total = self.layers(chunk)
        if chunk.has_embedding:
            total += 8 * self.tokens
        if chunk.has_final_norm:
            total += self.norm(self.config.hidden_size, self.shared_tokens)
        if chunk.has_head:
            total += self.head()
        return total + chunk.num_mtp_layers * self.mtp_layer()

    def layers(self, chunk: Chunk) -> float:
        """The trunk's layers, as recomputation leaves them. A recomputed piece keeps its input: of n layers under
        "uniform", of one under "block" (megatron/core/recompute.py)."""
        settings = self.settings
        kept, pieces = chunk.layers, 0
        if settings.recompute_granularity == "full":
            number = settings.recompute_num_layers
            uniform = settings.recompute_method == "uniform"
            pieces = -(-len(kept) // number) if uniform else min(number, len(kept))
            kept = () if uniform else kept[number:]
        plain = sum(count * self.layer(kind) for kind in (True, False) if (count := kept.count(kind)))
        return pieces * self.hidden() + (self.rope() if pieces else 0) + plain

    def mtp_layer(self) -> float:
        """One multi-token-prediction layer with its logits. Under full recomputation its block keeps its two inputs;
        the "block" method does not know it (multi_token_prediction.py:1415)."""
        width, tokens = self.config.hidden_size, self.shared_tokens
        around = self.head() + 16 * self.tokens  # the rolled tokens, mask and losses
        if self.settings.recompute_granularity == "full" and self.settings.recompute_method == "uniform":
            return around + 2 * self.hidden()
        joined = 2 * width * self.a * tokens  # eh_proj's input
        return around + 2 * self.norm(width, tokens) + joined + self.layer(is_moe=True) + self.norm(width, tokens)

    def head(self) -> float:
        """Its input, of whole sequences; labels, losses and two numbers a token; and what
        hymeg.models.linear_cross_entropy keeps of the logits: exponentials in the weight's dtype, or nothing with
        --recompute-logits. Megatron's fused cross-entropy keeps fp32 logits."""
        settings, per_token = self.settings, self.a * self.config.hidden_size + 16
        if settings.cross_entropy_loss_fusion:
            per_token += 4 * self.vocab
        elif not settings.hy_recompute_logits:
            per_token += self.a * self.vocab + 4 * -(-self.vocab * self.tokens // self.slice)
        return self.tokens * per_token

    # ---- adapters

    def for_gradient(self, width: float, tokens: float, *targets: str) -> float:
        """The input of a linear layer: kept for the gradient of its weight or, where that is frozen, of the A of its
        adapters; without any, not kept."""
        if self.settings.lora_rank is not None and not self.adapted & set(targets):
            return 0.0
        return self.a * width * tokens

    def adapters(self, width: float, tokens: float, after: float, *targets: str) -> float:
        """What the adapters of a linear layer keep beside its input: what comes out of each A, for `after` tokens; with
        dropout, its result and its mask."""
        count = len(self.adapted & set(targets)) if self.adapted else 0
        if not count:
            return 0.0
        dropped = (self.a + 1) * width * tokens if self.settings.lora_dropout else 0
        return count * self.a * self.settings.lora_rank * after + dropped

    # ---- a layer

    def layer(self, is_moe: bool) -> float:
        if is_moe not in self._layers:
            self._layers[is_moe] = self.attention() + (self.moe() if is_moe else self.dense_mlp())
        return self._layers[is_moe]

    def hidden(self) -> float:
        """The residual stream: a H for each of a rank's tokens."""
        return self.a * self.config.hidden_size * self.shared_tokens

    def norm(self, width: float, tokens: float) -> float:
        """A norm by itself, its output not counted. Local: torch's RMSNorm keeps its input and the normalised one in
        fp32, and the root; Transformer Engine's its input and the root."""
        return tokens * (8 * width + 4 if self.is_local else self.a * width + 4)

    def rope(self) -> float:
        """Angles, fp32, one row a position: what pieces of recomputed layers share."""
        return 4 * self.config.head_dim * self.positions

    def attention(self) -> float:
        """The norm, q/k/v, q and k norm, RoPE, attention, the output projection's input."""
        mixed, core = self.a * (self.q + 2 * self.kv), self.a * (self.q + self.kv)  # before RoPE; q and k with it
        per_position = 0.0
        if self.is_local:
            k_input = 8 if self.settings.bf16 else 4  # in fp32 the norm keeps a view of the mixed q, k, v
            norms = 8 * self.q + 4 * self.heads + k_input * self.kv + 4 * self.groups
            result = 0 if self.recomputes["core_attn"] else self.a * self.q + 4 * self.heads
            per_position = 4 * self.a * self.config.head_dim  # cosine and sine, for q and for k
            result += self.for_gradient(self.q, 1, "self_attn.o_proj")  # a copy in another order
        else:
            copied = self.a * self.q if self.groups > 1 else 0  # q out of the mixed q, k, v, where they alternate
            norms = copied + 4 * (self.heads + self.groups)
            # Attention's output is the projection's input.
            result = self.a * self.q + (0 if self.recomputes["core_attn"] else 4 * self.heads)
        own = self.tokens * (mixed + norms + core + result) + per_position * self.positions
        width, shared = self.config.hidden_size, self.shared_tokens
        own += self.for_gradient(width, shared, *_QKV) + self.adapters(width, shared, self.tokens, *_QKV)
        own += self.adapters(self.q, self.tokens, shared, "self_attn.o_proj")
        return self.norm(width, shared) + own

    def dense_mlp(self) -> float:
        """The norm, the gate-up projection's input and output, the down projection's input."""
        norm, tokens = self.norm(self.config.hidden_size, self.shared_tokens), self.tokens
        if self.recomputes["mlp"]:
            # Transformer Engine's first linear layer holds the norm, so that the residual stream is what stays.
            return norm + self.hidden() if self.is_local else self.hidden()
        return norm + self.mlp(self.dense, self.shared_tokens, tokens, "mlp")

    def mlp(self, width: float, before: float, tokens: float, path: str) -> float:
        """The input of a gate-up projection, for `before` tokens, its output, and the down projection's input."""
        hidden, gate_up, down = self.config.hidden_size, (f"{path}.gate_proj", f"{path}.up_proj"), f"{path}.down_proj"
        own = self.for_gradient(hidden, before, *gate_up) + self.for_gradient(width, tokens, down)
        own += self.adapters(hidden, before, tokens, *gate_up) + self.adapters(width, tokens, before, down)
        return own + self.a * 2 * width * tokens

    def shared_mlp(self) -> float:
        """Of the shared experts; their input is what the router keeps as well."""
        path, tokens = "mlp.shared_mlp", self.shared_tokens
        own_input = self.for_gradient(self.config.hidden_size, tokens, f"{path}.gate_proj", f"{path}.up_proj")
        return self.mlp(self.shared, tokens, self.tokens, path) - own_input

    def moe(self) -> float:
        """The norm, its output (which router, shared experts and dispatcher share), and the parts."""
        norm = self.norm(self.config.hidden_size, self.shared_tokens)
        if self.recomputes["moe"]:
            return norm + self.hidden()
        # Recomputed, the norm's output is made again (transformer_layer.py:504); the local norm cannot.
        output = 0 if self.recomputes["layernorm"] and not self.is_local else self.hidden()
        shared = 0 if self.recomputes["shared_experts"] else self.shared_mlp()
        return norm + output + shared + self.routing() + self.routed_experts()

    def routing(self) -> float:
        """Scores in fp32 and the order in which tokens leave: int64 for every expert, chosen or not, sorted; int64 and
        fp32 for the chosen.
        """
        chosen = self.config.num_experts_per_tok
        return self.shared_tokens * (12 * self.config.num_experts + 20 * chosen + 4)

    def routed_experts(self) -> float:
        """Tokens as they came out of the all-to-all, k of them for each, more on the busiest rank: H in, 2 I out of the
        gate-up projection, I into the down projection, and the fp32 weight."""
        tokens, path = self.expert_tokens, "mlp.experts"
        again = self.for_gradient(self.expert, tokens, f"{path}.down_proj") if self.recomputes["moe_act"] else 0
        return self.mlp(self.expert, tokens, tokens, path) - again + 4 * tokens

    # ---- what one operation needs for a moment

    def working(self, chunk: Chunk) -> float:
        """The largest of: the backward pass of a layer, with what it recomputes; of the head; of the embedding."""
        kinds = {*chunk.layers, *((True,) if chunk.num_mtp_layers else ())}
        is_frozen = self.settings.lora_rank is not None
        needs = [self.layer_backward(is_moe) for is_moe in kinds]
        if chunk.has_head:
            # Two slices of fp32 logits, the gradients of the weight and of the input (fp32); with the fused
            # cross-entropy those of all logits too.
            slices = 8 * min(self.slice, self.vocab * self.tokens)
            all_logits = self.a * self.vocab * self.tokens if self.settings.cross_entropy_loss_fusion else 0
            weight = 0 if is_frozen else self.a * self.vocab_parameters
            needs.append(slices + all_logits + weight + 4 * self.config.hidden_size * self.tokens)
        if not is_frozen and (chunk.has_embedding or chunk.num_mtp_layers):
            needs.append(self.a * self.vocab_parameters)
        return max(needs, default=0.0)

    def layer_backward(self, is_moe: bool) -> float:
        """What is recomputed of the layer, and the gradients of its widest part: of the tokens before and after the
        all-to-all, of the activation and its two inputs; of the MLP's three."""
        settings, recomputed = self.settings, 0.0
        if settings.recompute_granularity == "full":
            together = settings.recompute_num_layers if settings.recompute_method == "uniform" else 1
            recomputed = self.layer(is_moe) * together
        elif is_moe and self.recomputes["moe"]:
            recomputed = self.routing() + self.routed_experts() + self.shared_mlp()
        if is_moe:
            return recomputed + self.a * self.expert_tokens * (2 * self.config.hidden_size + 3 * self.expert)
        return recomputed + self.a * self.tokens * 3 * self.dense
