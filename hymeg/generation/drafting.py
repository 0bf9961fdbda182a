"""Drafts by the multi-token-prediction layers, which the trunk then verifies: several tokens for one pass of it.

Layer d combines, at position p, the hidden state of layer d - 1 there (of the trunk, for d = 1) with token p + d, and
predicts token p + d + 1 (DeepSeek-V3, section 2.2). Where the text is known up to token P, its first P hidden states
are, and layer d can be given all positions up to P - 1; in its last d - 1 the token is a draft, so that they are
computed again when the text is known.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from hymeg.errors import UserError
from hymeg.generation.stages import Stages
from hymeg.platform import device


@dataclasses.dataclass
class Drafting:
    """How many tokens to draft at a time, and how often the trunk agreed.

    Args:
        num_tokens: at most one for each multi-token-prediction layer.

    Attributes:
        proposed: for each depth, the drafts that were verified.
        accepted: for each depth, those that became the text, with all before them.
    """

    num_tokens: int
    proposed: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.proposed = self.proposed or [0] * self.num_tokens
        self.accepted = self.accepted or [0] * self.num_tokens

    @property
    def rate(self) -> float:
        """The share of all drafts that were accepted."""
        return sum(self.accepted) / max(sum(self.proposed), 1)

    @property
    def rates(self) -> list[float]:
        """The share of each depth."""
        return [a / max(p, 1) for a, p in zip(self.accepted, self.proposed, strict=True)]

    def count(self, num_proposed: int, num_accepted: int) -> None:
        for depth in range(num_proposed):
            self.proposed[depth] += 1
            self.accepted[depth] += depth < num_accepted

    def add(self, other: "Drafting") -> None:
        for depth in range(self.num_tokens):
            self.proposed[depth] += other.proposed[depth]
            self.accepted[depth] += other.accepted[depth]


class Text:
    """What the drafter keeps of a sequence.

    Attributes:
        done: for each layer, the positions whose tokens were not drafts.
        kept: for each layer, the hidden states `[n, h]` from there on that it still needs of the layer before.
    """

    def __init__(self, num_layers: int):
        self.done = [0] * num_layers
        self.kept: list[torch.Tensor | None] = [None] * num_layers

    def needed(self, layer: int, rows: torch.Tensor, end: int) -> torch.Tensor:
        """What `layer` is given of the layer before, whose newest hidden states up to position `end` are `rows`. What
        it will be given again is kept.
        """
        if (kept := self.kept[layer]) is not None:
            rows = torch.cat([kept, rows])
        start = self.done[layer]
        self.kept[layer] = rows[max(end - layer, 0) - start : max(end - layer + 1, 0) - start]
        return rows


class Drafter:
    """Drafts `num_tokens` for each of the sequences in the slots of a cache.

    Raises:
        UserError: the model has fewer multi-token-prediction layers, or not beside its head.
    """

    def __init__(self, stages: Stages, num_tokens: int, num_slots: int, max_length: int):
        num_layers = stages.config.mtp_num_layers or 0
        if not 1 <= num_tokens <= num_layers:
            raise UserError(
                f"{num_tokens} tokens are to be drafted at a time, and the model has {num_layers} "
                "multi-token-prediction layers, each of which drafts one; draft fewer, or none"
            )
        self.stages, self.chunk = stages, stages.chunks[-1]
        self.caches = [stages.cache(num_slots, max_length) for _ in range(num_tokens)]
        if stages.holds_head:
            if not self.chunk.mtp_process:
                raise UserError("drafting needs the multi-token-prediction layers in the stage of the head")
            layers = self.chunk.mtp.layers
            self.layers = [layers[0 if self.chunk.mtp.mtp_use_repeated_layer else d] for d in range(num_tokens)]

    def move(self, source: int, target: int) -> None:
        for cache in self.caches:
            cache.move(source, target)

    def draft(
        self, texts: Sequence[Text], tokens: Sequence[list[int]], hidden: Sequence[torch.Tensor] | None
    ) -> list[list[int]]:
        """Drafts for each slot. Every rank calls it, and those with the head compute; the others get zeros.

        Args:
            texts: of the slots.
            tokens: of each text, the last without hidden state.
            hidden: on ranks with the head, the trunk's of each text `[n, h]`, those that are new.
        """
        drafts: list[list[int]] = [[] for _ in texts]
        ends = [len(of_text) - 1 for of_text in tokens]
        for layer in range(len(self.caches)):
            starts = [text.done[layer] for text in texts]
            counts = [end - start for start, end in zip(starts, ends, strict=True)]
            length = self.stages.pass_length(sum(counts))
            chosen = [0] * len(texts)
            if hidden is not None and length:
                given = [
                    (of_text + of_drafts)[start + layer + 1 :]
                    for of_text, of_drafts, start in zip(tokens, drafts, starts, strict=True)
                ]
                self.caches[layer].begin(starts, counts)
                hidden, chosen = self._through(layer, hidden, given, length)
            for text, of_drafts, token, end in zip(texts, drafts, chosen, ends, strict=True):
                text.done[layer] = max(end - layer, 0)
                of_drafts.append(token)
            if hidden is not None and layer + 1 < len(self.caches):
                each = zip(texts, hidden, ends, strict=True)
                hidden = [text.needed(layer + 1, rows, end) for text, rows, end in each]
        return drafts

    def _through(
        self, layer: int, hidden: Sequence[torch.Tensor], tokens: Sequence[list[int]], length: int
    ) -> tuple[list[torch.Tensor], list[int]]:
        """The layer's hidden states of each text, and the token that it predicts at the end of each."""
        counts = [len(rows) for rows in hidden]
        padding = [0] * (length - sum(counts))
        ids = torch.tensor([[token for of_text in tokens for token in of_text] + padding], device=device.current())
        states = torch.cat([*hidden, ids.new_zeros(len(padding), self.stages.config.hidden_size)])[:, None]
        states = states.to(hidden[0].dtype if hidden else self.stages.config.params_dtype)
        if self.stages.config.sequence_parallel:
            states = scatter_to_sequence_parallel_region(states, group=self.stages.tensor_group)
        states = self.layers[layer]._proj_and_transformer_layer(
            hidden_states=states,
            decoder_input=self.chunk.embedding(input_ids=ids, position_ids=None),
            inference_params=self.caches[layer],
        )
        last = [end - 1 for end in itertools.accumulate(counts)]
        chosen = self.stages.logits(states, last).argmax(dim=-1).tolist() if last else []
        return list(self.stages.whole(states)[: sum(counts), 0].split(counts)), chosen
