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

    def num_left(self, sampling: Sampling) -> int:
        return sampling.max_new_tokens - (len(self.tokens) - self.prompt_length)

    def take(self, tokens: list[int], sampling: Sampling, drafting: Drafting | None) -> list[int]:
        """Add what a pass has chosen; what of it is the answer's."""
        if drafting:
            # A draft beyond the text's end was neither right nor wrong.
            num_judged = min(len(self.drafts), len(tokens)) if tokens[-1] in sampling.stop_ids else len(self.drafts)
            pairs = zip(tokens, self.drafts, strict=False)
            drafting.count(num_judged, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.num_computed = len(self.tokens) + len(tokens) - 1
        self.ended = tokens[-1] in sampling.stop_ids
        new = tokens[: len(tokens) - self.ended]
        self.tokens += new
        return new

    def answer(self) -> Answer:
        return Answer(self.tokens[self.prompt_length :], self.ended)


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
    waiting = deque(
        _Sequence(place, list(prompt), len(prompt), sampling.random_numbers(number), Text(num_drafts))
        for place, (number, prompt) in enumerate(zip(numbers, prompts, strict=True))
    )
    replies = _Replies(Stages(model), waiting, sampling, batch_size, drafting)
    answers: list[Answer | None] = [None] * len(prompts)
    with _evaluating(replies.stages):
        while (made := replies.advance()) is not None:
            for sequence, tokens, is_last in made:
                if is_last:
                    answers[sequence.place] = sequence.answer()
                if stream:
                    stream(sequence.place, tokens, is_last)
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
        self,
        stages: Stages,
        waiting: deque[_Sequence],
        sampling: Sampling,
        batch_size: int,
        drafting: Drafting | None,
    ):
        self.stages, self.waiting, self.sampling, self.drafting = stages, waiting, sampling, drafting
        self.num_slots = min(batch_size, len(waiting))
        max_length = max((sequence.prompt_length for sequence in waiting), default=0) + sampling.max_new_tokens
        self.cache = stages.cache(self.num_slots, max_length)
        self.drafter = drafting and Drafter(stages, drafting.num_tokens, self.num_slots, max_length)
        self.active: list[_Sequence] = []

    def advance(self) -> list[tuple[_Sequence, list[int], bool]] | None:
        """One pass: the sequences that were worked on, their new tokens, and whether they have ended. None where there
        is nothing left to do, here and on the ranks that this one is tied to.
        """
        _admit(self.waiting, self.active, self.num_slots)
        new = [sequence.waiting for sequence in self.active]
        length = self.stages.pass_length(sum(map(len, new)))
        if length == 0:
            return None
        self.cache.begin([sequence.num_computed for sequence in self.active], [len(tokens) for tokens in new])
        hidden = self.stages.hidden_states([token for tokens in new for token in tokens], length, self.cache)
        states = self.stages.whole(hidden)[:, 0] if self.drafter and self.stages.holds_head else None
        made, row = [], 0
        for sequence, passed, tokens in zip(self.active, new, self._chosen(hidden, new), strict=True):
            start = sequence.num_computed
            of_answer = sequence.take(tokens, self.sampling, self.drafting)
            if states is not None:
                sequence.states = states[row : row + sequence.num_computed - start]
            row += len(passed)
            made.append((sequence, of_answer, sequence.ended or sequence.num_left(self.sampling) == 0))
        self._dismiss({sequence.place for sequence, _, is_last in made if is_last})
        if self.drafter:
            self._draft()
        return made

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
                going = [i for i in going if self._goes_on(chosen[i], self.active[i].drafts)]
        table = torch.tensor([row + [-1] * (num_drafts + 1 - len(row)) for row in chosen], device=device.current())
        return [[token for token in row if token >= 0] for row in self.stages.agreed(table).tolist()]

    def _goes_on(self, chosen: list[int], drafts: list[int]) -> bool:
        return (
            len(chosen) <= len(drafts)
            and chosen[-1] == drafts[len(chosen) - 1]
            and chosen[-1] not in self.sampling.stop_ids
        )

    def _dismiss(self, places: set[int]) -> None:
        """Take out what has ended; the last slot's sequence moves into the gap."""
        for slot in reversed(range(len(self.active))):
            if self.active[slot].place not in places:
                continue
            last = self.active.pop()
            if slot < len(self.active):
                self.active[slot] = last
                for cache in (self.cache, self.drafter) if self.drafter else (self.cache,):
                    cache.move(len(self.active), slot)

    def _draft(self) -> None:
        holds_head = self.stages.holds_head
        drafts = self.drafter.draft(
            [sequence.text for sequence in self.active],
            [sequence.tokens for sequence in self.active],
            [sequence.states for sequence in self.active] if holds_head else None,
        )
        drafts = self.stages.agreed(torch.tensor(drafts, device=device.current())).tolist()
        for sequence, of_sequence in zip(self.active, drafts, strict=True):
            sequence.drafts = of_sequence[: sequence.num_left(self.sampling) - 1]


def _admit(waiting: deque[_Sequence], active: list[_Sequence], num_slots: int) -> None:
    """Let prompts in where there are slots, and not too many tokens at once."""
    begun = 0
    while waiting and len(active) < num_slots and (begun == 0 or begun + len(waiting[0].tokens) <= _TOKENS_AT_A_TIME):
        begun += len(waiting[0].tokens)
        active.append(waiting.popleft())


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
