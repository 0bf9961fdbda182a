"""Every layout generates what one process does, token for token: greedy, with prompts of several lengths dealt out to
data-parallel and context-parallel ranks; drawn, with the same prompts on all of them.
"""

import pytest
from test_layouts import CP2, EP2, PP2, TP2, VPP2

LAYOUTS = {
    2: {
        "TP2 SP": (TP2, "mtp"),
        "PP2": (PP2, "mtp"),
        "PP2 VPP2": (f"{PP2} {VPP2}", "mtp"),
        "PP2 layout string": (f"{PP2} --pipeline-model-parallel-layout Et|tttmL", "mtp"),
        "EP2 allgather": (f"{EP2} --moe-token-dispatcher-type allgather", "mtp"),
        "ETP2": ("--expert-tensor-parallel-size 2", "mtp"),
        "TP2 ETP1": (f"{TP2} --expert-tensor-parallel-size 1", "mtp"),
        "CP2": (CP2, "mtp"),
        "DP2": ("", "mtp"),
    },
    4: {"TP2 PP2 EP2 ETP1": (f"{TP2} {PP2} {EP2} --expert-tensor-parallel-size 1", "mtp")},
    8: {"TP2 PP2 CP2 EP2": (f"{TP2} {PP2} {CP2} {EP2}", "mtp")},
}


@pytest.fixture(scope="module")
def one(worlds, command):
    return worlds.run(1, command(checkpoint="mtp"), "generation")


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_same_text_as_one_process(worlds, command, one, size, name):
    flags, checkpoint = LAYOUTS[size][name]
    assert worlds.run(size, command(flags, checkpoint=checkpoint), "generation") == one


def test_answers_differ_in_length_and_end(one):
    """Otherwise nothing would be seen of slots that are taken anew."""
    assert one["greedy"][:3] != one["drawn"]
    assert {ended for _, ended in one["greedy"]} == {True, False}
    assert len({len(tokens) for tokens, _ in one["greedy"]}) > 2
