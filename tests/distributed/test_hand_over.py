"""examples/hand_over.py: a transformers model in another process has the trainer's logits after every hand-over."""

import pytest

TP2, EP2 = (f"--{name}-parallel-size 2" for name in ("tensor-model", "expert-model"))


@pytest.mark.parametrize(("flags", "checkpoint"), [(f"{TP2} {EP2} --expert-tensor-parallel-size 1", "mtp")])
def test_the_other_process_computes_the_same_logits_every_time(worlds, command, flags, checkpoint):
    found = worlds.run(2, command(flags, checkpoint=checkpoint, steps=4), "hand_over")
    assert len(found["differences"]) == 2
    assert max(found["differences"]) <= 1e-5 * found["largest"]
    assert min(found["moved"]) > 1e-3 * found["largest"]  # between hand-overs: old weights would not pass
