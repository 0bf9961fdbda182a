"""Prompts to answers: which sequences are worked on, what they need of the next pass, when they have ended."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hymeg.generation.sampling import Sampling, choose
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
        num_computed: tokens whose keys and values are in the cache.
        generator: its random numbers.
        ended: whether by a stop token.
    """

    place: int
    tokens: list[int]
    prompt_length: int
    generator: np.random.Generator
    num_computed: int = 0
    ended: bool = False

    @property
    def waiting(self) -> list[int]:
        """What the next pass takes of it."""
        return self.tokens[self.num_computed :]

    def take(self, token: int, sampling: Sampling) -> bool:
        """One token more; whether it is the last."""
        self.num_computed = len(self.tokens)
        if token in sampling.stop_ids:
            self.ended = True
            return True
        self.tokens.append(token)
        return len(self.tokens) - self.prompt_length >= sampling.max_new_tokens

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
        stream: is told a prompt's place in the list, its new tokens, and whether they are the last; as they come.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {next(i for i, prompt in enumerate(prompts) if not len(prompt))} is empty")
    stages = Stages(model)
    max_length = max((len(prompt) for prompt in prompts), default=0) + sampling.max_new_tokens
    cache = stages.cache(min(batch_size, len(prompts)), max_length)
    numbers = range(len(prompts)) if numbers is None else numbers
    waiting = deque(
        _Sequence(place, list(prompt), len(prompt), sampling.random_numbers(number))
        for place, (number, prompt) in enumerate(zip(numbers, prompts, strict=True))
    )
    active: list[_Sequence] = []
    answers: list[Answer | None] = [None] * len(prompts)
    with _evaluating(stages.chunks):
        while True:
            _admit(waiting, active, cache.num_slots)
            length = stages.pass_length(sum(len(sequence.waiting) for sequence in active))
            if length == 0:
                return answers
            for sequence, token in zip(active, _next_tokens(stages, cache, active, length, sampling), strict=True):
                if is_last := sequence.take(token, sampling):
                    answers[sequence.place] = sequence.answer()
                if stream:
                    stream(sequence.place, [] if sequence.ended else [token], is_last)
            _dismiss(active, answers, cache)


def generate_dealt(
    model: torch.nn.Module | Sequence[torch.nn.Module], prompts: Sequence[Sequence[int]], sampling: Sampling, **options
) -> list[Answer]:
    """As `generate`, with the prompts dealt out to data-parallel and context-parallel ranks. All ranks of the world
    must call it alike, and get all answers.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = range(group.rank(), len(prompts), group.size())
    answers = generate(model, [prompts[i] for i in own], sampling, numbers=own, **options)
    dealt = [None] * group.size()
    dist.all_gather_object(dealt, answers, group=group)
    return [dealt[i % group.size()][i // group.size()] for i in range(len(prompts))]


def _next_tokens(stages: Stages, cache, active: list[_Sequence], length: int, sampling: Sampling) -> list[int]:
    """One for each active sequence."""
    new = [sequence.waiting for sequence in active]
    cache.begin([sequence.num_computed for sequence in active], [len(tokens) for tokens in new])
    hidden = stages.hidden_states([token for tokens in new for token in tokens], length, cache)
    chosen = [0] * len(active)
    if active and stages.holds_head:
        last = (np.cumsum([len(tokens) for tokens in new]) - 1).tolist()
        chosen = choose(
            stages.logits(hidden, last),
            sampling,
            [sequence.tokens for sequence in active],
            [sequence.generator for sequence in active],
        )
    return stages.agreed(torch.tensor(chosen, device=device.current())).tolist()


def _admit(waiting: deque[_Sequence], active: list[_Sequence], num_slots: int) -> None:
    """Let prompts in where there are slots, and not too many tokens at once."""
    begun = 0
    while waiting and len(active) < num_slots and (begun == 0 or begun + len(waiting[0].tokens) <= _TOKENS_AT_A_TIME):
        begun += len(waiting[0].tokens)
        active.append(waiting.popleft())


def _dismiss(active: list[_Sequence], answers: list[Answer | None], cache) -> None:
    """Take out what has ended; the last slot's sequence moves into the gap."""
    for slot in reversed(range(len(active))):
        if answers[active[slot].place] is None:
            continue
        last = active.pop()
        if slot < len(active):
            active[slot] = last
            cache.move(len(active), slot)


@contextlib.contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Dropout off, and everything as it was after."""
    were = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for module, training in were:
            module.training = training
