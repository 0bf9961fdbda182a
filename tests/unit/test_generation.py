"""Generated text is that of transformers, token for token; drawn text follows transformers' filters and depends on
nothing but seed and prompt.
"""

import collections
import itertools

import numpy as np
import pytest
import torch
from single_process import build
from transformers import (
    AutoModelForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.generation import Sampling, generate, generate_dealt, replies
from hymeg.generation.sampling import _filtered, _penalized, choose
from hymeg.generation.shortcuts import _WAYS, shortened
from hymeg.generation.stages import Stages
from hymeg.hf.config import HyConfig
from hymeg.models.router import Router

KINDS = {
    "Hy-MT2": {"num_attention_heads": 8, "num_key_value_heads": 1, "num_experts": 16, "num_hidden_layers": 3},
    "Hy3": {"hidden_size": 96, "num_attention_heads": 16, "num_key_value_heads": 2, "num_nextn_predict_layers": 1},
}
NUM_NEW = 8
STOP_IDS = tuple(range(0, 1000, 12))  # so many that an untrained model comes upon one


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    types = ["dense"] + ["sparse"] * (KINDS[request.param].get("num_hidden_layers", 4) - 1)
    config = HyConfig.from_dict(TINY_CONFIG | KINDS[request.param] | {"mlp_layer_types": types})
    write_tiny_checkpoint(folder, config, dtype="fp32", seed=3)
    return build(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]


def theirs_of(model, prompts: list[list[int]], **options) -> list[tuple[list[int], bool]]:
    """transformers' answers to prompts of one length, with a cache and without padding."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=list(STOP_IDS),
            pad_token_id=STOP_IDS[0],
            **options,
        )
    answers = []
    for row in found[:, len(prompts[0]) :].tolist():
        end = next((i for i, token in enumerate(row) if token in STOP_IDS), None)
        answers.append((row[:end], end is not None))
    return answers


def ours_of(model, prompts: list[list[int]], **options) -> list[tuple[list[int], bool]]:
    answers = generate(model, prompts, Sampling(NUM_NEW, stop_ids=STOP_IDS, **options))
    return [(answer.tokens, answer.ended) for answer in answers]


def test_200_greedy_answers_equal_those_of_transformers(pair):
    """Prompts of 20 lengths, mixed in one call; one reaches beyond the cache's first capacity."""
    ours, theirs = pair
    lengths = [*range(1, 55, 3), 120, 251]
    prompts = random_prompts([length for _ in range(10) for length in lengths])
    found = ours_of(ours, prompts)
    expected: list = [None] * len(prompts)
    for i in range(len(lengths)):
        expected[i :: len(lengths)] = theirs_of(theirs, prompts[i :: len(lengths)])
    assert found == expected and len(found) == 200
    assert 20 < sum(ended for _, ended in found) < 180
    assert len({token for tokens, _ in found for token in tokens}) > 200


def test_a_repetition_penalty_is_that_of_transformers(pair):
    ours, theirs = pair
    prompts = random_prompts([40] * 4, seed=1)
    expected = theirs_of(theirs, prompts, repetition_penalty=1.5)
    assert ours_of(ours, prompts, repetition_penalty=1.5) == expected != theirs_of(theirs, prompts)


def test_drawn_text_depends_on_seed_and_prompt_only(pair, monkeypatch):
    model, _ = pair
    prompts = random_prompts([5, 30, 5, 17, 1, 5])
    sampling = Sampling(NUM_NEW, temperature=1.0, top_p=0.9, seed=7, stop_ids=STOP_IDS)
    together = generate(model, prompts, sampling)
    assert generate(model, prompts, sampling, batch_size=2) == together
    assert generate_dealt(model, prompts, sampling) == together
    monkeypatch.setattr(replies, "_TOKENS_AT_A_TIME", 20)  # that begin together; a longer prompt begins alone
    assert generate(model, prompts, sampling) == together
    assert generate(model, prompts[3:4], sampling, numbers=[3]) == together[3:4]
    assert generate(model, prompts, Sampling(**{**vars(sampling), "seed": 8})) != together
    same_prompt = generate(model, prompts[1:2] * 2, sampling)
    assert same_prompt[0] != same_prompt[1]


def test_tokens_come_as_they_are_made(pair):
    model, _ = pair
    prompts, told, ends = random_prompts([3, 9, 4]), collections.defaultdict(list), []

    def stream(place: int, tokens: list[int], is_last: bool) -> None:
        assert place not in ends
        told[place].extend(tokens)
        ends.extend([place] * is_last)

    answers = generate(model, prompts, Sampling(NUM_NEW, stop_ids=STOP_IDS), stream=stream)
    assert [told[place] for place in range(3)] == [answer.tokens for answer in answers]
    assert sorted(ends) == [0, 1, 2]


def test_the_model_is_left_as_it_was(pair):
    model, _ = pair
    model.train()
    frozen = next(model.children()).eval()
    generate(model, random_prompts([4]), Sampling(2))
    assert model.training and not frozen.training and model.decoder.layers[1].training
    model.train()
    assert all(not module.expert_load.any() for module in model.modules() if isinstance(module, Router))
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_shortest_way_through_a_layer_gives_what_megatrons_own_does(pair):
    model, _ = pair
    stages, tokens = Stages(model.eval()), random_prompts([9])[0]

    @torch.no_grad()
    def hidden(*starts: int) -> torch.Tensor:
        cache, found = stages.cache(1, 9), []
        for start, end in itertools.pairwise([*starts, 9]):
            cache.begin([start], [end - start])
            found.append(stages.hidden_states(tokens[start:end], end - start, cache))
        return torch.cat(found)

    of_megatron = hidden(0, 7, 8)
    with shortened(stages.chunks):
        short = {type(module) for module in model.modules() if "forward" in vars(module)}
        assert short == {*_WAYS} and torch.equal(hidden(0, 7, 8), of_megatron)
    experts = model.decoder.layers[1].mlp.experts
    hook = experts.linear_fc2.register_forward_hook(lambda layer, given, output: (3 * output[0], None))
    hooked = hidden(0, 7, 8)
    with shortened(stages.chunks):
        assert torch.equal(hidden(0, 7, 8), hooked) and not torch.equal(hooked, of_megatron)
    hook.remove()


def test_prompts_and_settings_that_cannot_be(pair):
    model, _ = pair
    assert generate(model, [], Sampling()) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], Sampling())
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_filters_are_those_of_transformers():
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    seen = random_prompts([30] * 6)
    seen = [[token % 500 for token in row] for row in seen]
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.3)
    expected = logits
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
    ):
        expected = processor(torch.tensor(seen), expected)
    found = _filtered(_penalized(logits, 1.3, seen) / 0.7, sampling)
    assert torch.equal(found, expected)
    assert 1 < expected[0].isfinite().sum() < 40


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[1.0, 3.0, -1.0, 2.0, 0.5]])
    generator, n = np.random.default_rng(0), 4000
    counts = collections.Counter(
        choose(logits.expand(n, -1), Sampling(temperature=2.0, top_k=4), [[]] * n, [generator] * n)
    )
    kept = [0, 1, 3, 4]
    probabilities = torch.softmax(logits[0, kept] / 2.0, dim=0)
    assert set(counts) == set(kept)
    for token, probability in zip(kept, probabilities.tolist(), strict=True):
        assert abs(counts[token] - n * probability) < 4 * (n * probability * (1 - probability)) ** 0.5
