"""What a layout generates, for checks.py: greedy, drawn, and with a stop token that ends answers at different times."""

import torch
import torch.distributed as dist

from hymeg.checkpoint.live import load_weights
from hymeg.generation import Drafting, Sampling, generate, generate_dealt
from hymeg.training.loaded import build_model
from hymeg.training.preflight import preflight

STOP_IDS = tuple(range(0, 1000, 9))
LENGTHS = (1, 7, 20, 3, 33, 12, 5)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in LENGTHS]


def generated(args, config) -> dict:
    """Greedy and drawn answers, as every rank was given them."""
    load = args.load
    preflight(args, config, lambda note: None)
    model = build_model(args)
    load_weights(model, config, load)
    greedy, drawn = Sampling(6, stop_ids=STOP_IDS), Sampling(6, temperature=1.0, top_p=0.95, seed=5, stop_ids=STOP_IDS)
    drafting = Drafting(1)
    found = {
        "greedy": generate_dealt(model, prompts(), greedy, batch_size=3, drafting=drafting),
        "drawn": generate(model, prompts()[:3], drawn, batch_size=3),
    }
    found = {name: [(answer.tokens, answer.ended) for answer in answers] for name, answers in found.items()}
    found["drafts"] = [drafting.proposed, drafting.accepted]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert all(of_rank == found for of_rank in everyone), everyone
    return found
