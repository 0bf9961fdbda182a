"""Drafts of the multi-token-prediction layers change no token, and how often they are right is what comes out when
everything is computed anew for each of them.
"""

import pytest
import torch
from single_process import build, positions
from test_generation import random_prompts

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint
from hymeg.errors import UserError
from hymeg.generation import Drafting, Sampling, generate, generate_dealt

NUM_NEW, DEPTHS = 10, 2
PROMPTS = random_prompts([6] * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder, dtype="fp32", num_mtp_layers=DEPTHS)
    return folder


@pytest.fixture(scope="module")
def untrained(folder):
    return build(folder)


@pytest.fixture(scope="module")
def trained(folder, untrained):
    """The same trunk, with layers that have learned something of its answers to `PROMPTS`."""
    model, answers = build(folder).train(), generate(untrained, PROMPTS, Sampling(NUM_NEW))
    texts = torch.tensor([prompt + answer.tokens for prompt, answer in zip(PROMPTS, answers, strict=True)])
    inputs, labels = texts[:, :-1], texts[:, 1:]
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)
    optimizer = torch.optim.Adam(model.mtp.parameters(), lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model(inputs, positions(inputs), None, labels=labels, loss_mask=torch.ones(labels.shape)).mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def drafts_anew(model, text: list[int], num_drafts: int) -> list[int]:
    """What the layers draft behind `text`, by a whole pass for each depth."""
    drafts: list[int] = []
    for depth in range(1, num_drafts + 1):
        tokens = torch.tensor([text + drafts])
        angles = model.rotary_pos_emb(tokens.shape[1])
        hidden = model.decoder(model.embedding(tokens, positions(tokens)), None, rotary_pos_emb=angles)
        states = model.mtp(
            input_ids=tokens,
            position_ids=positions(tokens),
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=angles,
            embedding=model.embedding,
        )
        place = len(text) - 2  # the last position whose next token is known
        logits, _ = model.output_layer(states.chunk(1 + model.config.mtp_num_layers)[depth][place : place + 1])
        drafts.append(int(logits[0, 0].argmax()))
    return drafts


def counted_anew(model, prompt: list[int], answer: list[int], num_drafts: int, max_new: int) -> Drafting:
    """The same counts from the finished answer."""
    counts, made, model = Drafting(num_drafts), 1, model.eval()
    while made < len(answer):
        drafts = drafts_anew(model, prompt + answer[:made], num_drafts)[: max_new - made - 1]
        right = 0
        while right < len(drafts) and drafts[right] == answer[made + right]:
            right += 1
        counts.count(len(drafts), right)
        made += right + 1
    return counts


@pytest.mark.parametrize("num_drafts", [1, DEPTHS])
def test_the_text_is_the_same_and_the_counts_those_of_brute_force(trained, num_drafts):
    prompts = [*PROMPTS, *random_prompts([1, 2], seed=1)]
    plain = generate(trained, prompts, Sampling(NUM_NEW))
    drafting = Drafting(num_drafts)
    assert generate_dealt(trained, prompts, Sampling(NUM_NEW), drafting=drafting, batch_size=3) == plain
    expected = Drafting(num_drafts)
    for prompt, answer in zip(prompts, plain, strict=True):
        expected.add(counted_anew(trained, prompt, answer.tokens, num_drafts, NUM_NEW))
    assert drafting == expected
    assert 0 < drafting.rate < 1 and drafting.rate == sum(drafting.accepted) / sum(drafting.proposed)
    assert drafting.rates[0] >= drafting.rates[-1] > 0


def test_trained_layers_are_right_more_often_than_untrained_ones(untrained, trained):
    found, plain = [], generate(untrained, PROMPTS, Sampling(NUM_NEW))
    for model in (untrained, trained):
        found.append(Drafting(DEPTHS))
        assert generate(model, PROMPTS, Sampling(NUM_NEW), drafting=found[-1]) == plain
    assert found[0].rate < 0.1 < 0.3 < found[1].rate


def test_drawn_text_is_the_same_too_and_so_is_where_it_ends(trained):
    first, second, *_ = generate(trained, PROMPTS, Sampling(NUM_NEW))
    for sampling in (
        Sampling(NUM_NEW, temperature=0.5, top_p=0.9, seed=1, repetition_penalty=1.1),
        Sampling(NUM_NEW, stop_ids=(first.tokens[2], second.tokens[4])),
        Sampling(1),
    ):
        plain, streamed = generate(trained, PROMPTS, sampling), [[] for _ in PROMPTS]
        found = generate(
            trained,
            PROMPTS,
            sampling,
            drafting=Drafting(DEPTHS),
            stream=lambda place, tokens, _, into=streamed: into[place].extend(tokens),
        )
        assert found == plain and streamed == [answer.tokens for answer in plain]


def test_counts_do_not_depend_on_what_else_is_in_the_batch(trained):
    """The first sequence ends early, and the last one moves into its slot, with what the layers keep of it."""
    first, *_ = generate(trained, PROMPTS, Sampling(NUM_NEW))
    alone, together = Drafting(DEPTHS), Drafting(DEPTHS)
    for drafting, batch_size in ((alone, 1), (together, len(PROMPTS))):
        sampling = Sampling(NUM_NEW, stop_ids=(first.tokens[1],))
        generate(trained, PROMPTS, sampling, drafting=drafting, batch_size=batch_size)
    assert alone == together


def test_no_more_is_drafted_than_there_are_layers(untrained):
    with pytest.raises(UserError, match="3 tokens are to be drafted at a time, and the model has 2"):
        generate(untrained, [[1]], Sampling(), drafting=Drafting(3))
