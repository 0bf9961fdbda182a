"""Prompts to answers: which sequences are worked on, what they need of the next pass, when they have ended."""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hymeg.generation.drafting import Drafter, Drafting, Text
from hymeg.generation.sampling import Sampling, choose
from hymeg.generation.shortcuts import shortened
from hymeg.generation.stages import Stages
from hymeg.platform import device

Stream = Callable[[int, list[int], bool], None]

_TOKENS_AT_A_TIME = 8192
"""Of prompts that begin in one pass, more only where a single one is longer."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Tokens without the prompt and without the token that ended it; whether one did, or the limit was reached."""

    tokens: list[int]
    ended: bool


@dataclasses.dataclass
class _Sequence:
    """A prompt and its answer so far.

    Attributes:
        place: of the prompt in the list.
        tokens: of both.
        prompt_length: in tokens.
        limit: of both, in tokens.
        generator: its random numbers.
        text: what the drafter keeps of it.
        num_computed: tokens whose keys and values are in the cache.
        drafts: tokens that may come next.
        states: with drafting, the trunk's hidden states `[n, h]` of the last pass that are of the text.
        ended: whether by a stop token.
    """

    place: int
    tokens: list[int]
    prompt_length: int
    limit: int
    generator: np.random.Generator
    text: Text
    num_computed: int = 0
    drafts: list[int] = dataclasses.field(default_factory=list)
    states: torch.Tensor | None = None
    ended: bool = False

    @property
    def waiting(self) -> list[int]:
        """What the next pass takes of it."""
        return self.tokens[self.num_computed :] + self.drafts

    @property
    def is_done(self) -> bool:
        return self.ended or len(self.tokens) == self.limit

    def take(self, tokens: list[int], stop_ids: Sequence[int], drafting: Drafting | None) -> list[int]:
        """Add what a pass has chosen; what of it is the answer's."""
        self.ended = tokens[-1] in stop_ids
        if drafting:
            # A draft beyond the text's end was neither right nor wrong.
            num_judged = min(len(self.drafts), len(tokens)) if self.ended else len(self.drafts)
            pairs = zip(tokens, self.drafts, strict=False)
            drafting.count(num_judged, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.num_computed = len(self.tokens) + len(tokens) - 1
        new = tokens[: len(tokens) - self.ended]
        self.tokens += new
        return new


@torch.no_grad()
def generate(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 16,
    numbers: Sequence[int] | None = None,
    drafting: Drafting | None = None,
    stream: Stream | None = None,
) -> list[Answer]:
    """Answers to `prompts`, in their order.

    All ranks of a tensor- and pipeline-parallel group must call it alike, and get the same answers; others may have
    other prompts, or none. Under expert parallelism every rank of the world must call it.

    Args:
        model: the model, or its virtual stages on this rank.
        prompts: their tokens; none may be empty.
        sampling: how tokens are drawn.
        batch_size: sequences at a time; where one ends, the next prompt takes its place.
        numbers: of the prompts, by which their random numbers are drawn; their places in the list by default.
        drafting: by the multi-token-prediction layers: the same text in fewer passes; counts how often they are right.
        stream: is told a prompt's place in the list, its new tokens, and whether they are the last; as they come.

    Raises:
        ValueError: a prompt is empty.
        UserError: the model cannot draft so many tokens.
    """
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {next(i for i, prompt in enumerate(prompts) if not len(prompt))} is empty")
    numbers = range(len(prompts)) if numbers is None else numbers
    num_drafts = drafting.num_tokens if drafting else 0
    waiting = deque()
    for place, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        limit, generator = len(prompt) + sampling.max_new_tokens, sampling.random_numbers(number)
        waiting.append(_Sequence(place, list(prompt), len(prompt), limit, generator, Text(num_drafts)))
    stages = Stages(model)
    answers: list[Answer | None] = [None] * len(prompts)
    with _evaluating(stages):
        for sequence, tokens in _Replies(stages, waiting, sampling, batch_size, drafting).passes():
            if sequence.is_done:
                answers[sequence.place] = Answer(sequence.tokens[sequence.prompt_length :], sequence.ended)
            if stream:
                stream(sequence.place, tokens, sequence.is_done)
    return answers


def generate_dealt(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    drafting: Drafting | None = None,
    **options,
) -> list[Answer]:
    """As `generate`, with the prompts dealt out to data-parallel and context-parallel ranks. All ranks of the world
    must call it alike, and get all answers, and the drafts' counts of all.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own, counts = range(group.rank(), len(prompts), group.size()), drafting and Drafting(drafting.num_tokens)
    answers = generate(model, [prompts[i] for i in own], sampling, numbers=own, drafting=counts, **options)
    dealt = [None] * group.size()
    dist.all_gather_object(dealt, (answers, counts), group=group)
    for _, of_rank in dealt if drafting else []:
        drafting.add(of_rank)
    return [dealt[i % group.size()][0][i // group.size()] for i in range(len(prompts))]


class _Replies:
    """The sequences that are being worked on, each in a slot of the cache."""

    def __init__(
        self, stages: Stages, waiting: deque[_Sequence], sampling: Sampling, batch_size: int, drafting: Drafting | None
    ):
        self.stages, self.waiting, self.sampling, self.drafting = stages, waiting, sampling, drafting
        self.num_slots = min(batch_size, len(waiting))
        max_length = max((sequence.limit for sequence in waiting), default=sampling.max_new_tokens)
        self.cache = stages.cache(self.num_slots, max_length)
        self.drafter = drafting and Drafter(stages, drafting.num_tokens, self.num_slots, max_length)
        self.active: list[_Sequence] = []

    def passes(self) -> Iterator[tuple[_Sequence, list[int]]]:
        """After each pass the sequences that were worked on and their new tokens, until nothing is left to do, here and
        on the ranks that this one is tied to.
        """
        while True:
            self._admit()
            new = [sequence.waiting for sequence in self.active]
            length = self.stages.pass_length(sum(map(len, new)))
            if length == 0:
                return
            self.cache.begin([sequence.num_computed for sequence in self.active], [len(tokens) for tokens in new])
            hidden = self.stages.hidden_states([token for tokens in new for token in tokens], length, self.cache)
            states = self.stages.whole(hidden)[:, 0] if self.drafter and self.stages.holds_head else None
            made, row = [], 0
            for sequence, passed, tokens in zip(self.active, new, self._chosen(hidden, new), strict=True):
                start = sequence.num_computed
                made.append((sequence, sequence.take(tokens, self.sampling.stop_ids, self.drafting)))
                if states is not None:
                    sequence.states = states[row : row + sequence.num_computed - start]
                row += len(passed)
            self._dismiss()
            if self.drafter:
                self._draft()
            yield from made

    def _admit(self) -> None:
        """Let prompts in where there are slots, and not too many tokens at once."""
        begun = 0
        while self.waiting and len(self.active) < self.num_slots:
            num_tokens = len(self.waiting[0].tokens)
            if begun and begun + num_tokens > _TOKENS_AT_A_TIME:
                return
            begun += num_tokens
            self.active.append(self.waiting.popleft())

    def _chosen(self, hidden: torch.Tensor | None, new: list[list[int]]) -> list[list[int]]:
        """For each active sequence what comes next: its drafts as far as they are right, and one token more."""
        num_drafts = self.drafting.num_tokens if self.drafting else 0
        chosen: list[list[int]] = [[] for _ in self.active]
        if self.active and hidden is not None:
            ends = itertools.accumulate(map(len, new))
            spans = [range(end - len(s.drafts) - 1, end) for s, end in zip(self.active, ends, strict=True)]
            logits = self.stages.logits(hidden, [row for span in spans for row in span])
            firsts = [0, *itertools.accumulate(map(len, spans))]
            going = list(range(len(self.active)))
            while going:
                sequences = [self.active[i] for i in going]
                tokens = choose(
                    logits[[firsts[i] + len(chosen[i]) for i in going]],
                    self.sampling,
                    [sequence.tokens + chosen[i] for i, sequence in zip(going, sequences, strict=True)],
                    [sequence.generator for sequence in sequences],
                )
                for i, token in zip(going, tokens, strict=True):
                    chosen[i].append(token)
                going = [i for i in going if chosen[i] == self.active[i].drafts[: len(chosen[i])]]
                going = [i for i in going if chosen[i][-1] not in self.sampling.stop_ids]
        table = torch.tensor([row + [-1] * (num_drafts + 1 - len(row)) for row in chosen], device=device.current())
        return [[token for token in row if token >= 0] for row in self.stages.agreed(table).tolist()]

    def _dismiss(self) -> None:
        """Take out what has ended; the last slot's sequence moves into the gap."""
        for slot in reversed(range(len(self.active))):
            if not self.active[slot].is_done:
                continue
            last = self.active.pop()
            if slot < len(self.active):
                self.active[slot] = last
                for cache in (self.cache, self.drafter) if self.drafter else (self.cache,):
                    cache.move(len(self.active), slot)

    def _draft(self) -> None:
        drafts = self.drafter.draft(
            [sequence.text for sequence in self.active],
            [sequence.tokens for sequence in self.active],
            [sequence.states for sequence in self.active] if self.stages.holds_head else None,
        )
        drafts = self.stages.agreed(torch.tensor(drafts, device=device.current())).tolist()
        for sequence, of_sequence in zip(self.active, drafts, strict=True):
            sequence.drafts = of_sequence[: sequence.limit - len(sequence.tokens) - 1]


@contextlib.contextmanager
def _evaluating(stages: Stages) -> Iterator[None]:
    """Dropout off, and everything as it was after."""
    training = [module for chunk in stages.chunks for module in chunk.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with contextlib.ExitStack() as stack:
            if stages.config.transformer_impl == "local":
                stack.enter_context(device.unwatched())
                stack.enter_context(shortened(stages.chunks))
            yield
    finally:
        for module in training:
            module.training = True
