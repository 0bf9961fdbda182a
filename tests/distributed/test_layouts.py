"""Every layout trains as one process does: from one loaded checkpoint, in fp32, three steps, losses and gradient norms
to 1e-5. And every rank of it holds the bytes that the planner says, and is given all weights by the others."""

import itertools

import pytest
from live_weights import LIVE_WEIGHTS, digest
from safetensors.torch import load_file
from worlds import assert_same_training, largest_difference

from hymeg.checkpoint.convert import dist_to_hf, hf_to_dist
from hymeg.checkpoint.mapping import HF_LAYOUTS

TP2, PP2, CP2, EP2 = (
    f"--{name}-parallel-size 2" for name in ("tensor-model", "pipeline-model", "context", "expert-model")
)
VPP2 = "--num-virtual-stages-per-pipeline-rank 2"

LAYOUTS = {  # world size -> name -> flags, checkpoint
    2: {
        "TP2 SP": (TP2, "trunk"),
        "PP2": (PP2, "mtp"),
        "PP2 VPP2": (f"{PP2} {VPP2}", "mtp"),
        "PP2 uneven": (f"{PP2} --decoder-first-pipeline-num-layers 1", "trunk"),
        "PP2 layout string": (f"{PP2} --pipeline-model-parallel-layout Et|tttmL", "mtp"),
        "EP2 alltoall": (EP2, "trunk"),
        "EP2 allgather": (f"{EP2} --moe-token-dispatcher-type allgather", "mtp"),
        "ETP2": ("--expert-tensor-parallel-size 2", "trunk"),
        "TP2 ETP1": (f"{TP2} --expert-tensor-parallel-size 1", "trunk"),
        "CP2": (CP2, "mtp"),
        "DP2": ("", "trunk"),
        "DP2 overlap": ("--overlap-grad-reduce", "trunk"),
        "DP2 distributed optimizer": ("--use-distributed-optimizer", "mtp"),
        "DP2 distributed optimizer, overlaps": (
            "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
            "trunk",
        ),
        "TP2 recompute": (
            f"{TP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            "trunk",
        ),
    },
    4: {
        "TP2 PP2": (f"{TP2} {PP2}", "trunk"),
        "TP2 EP2": (f"{TP2} {EP2}", "mtp"),
        "EP2 CP2": (f"{EP2} {CP2}", "trunk"),
        "PP2 EP2": (f"{PP2} {EP2} --use-distributed-optimizer", "trunk"),
        "TP2 PP2 EP2 ETP1": (f"{TP2} {PP2} {EP2} --expert-tensor-parallel-size 1 --use-distributed-optimizer", "trunk"),
        "EP4": ("--expert-model-parallel-size 4", "trunk"),
    },
    8: {
        "TP2 PP2 EP2": (f"{TP2} {PP2} {EP2} --use-distributed-optimizer", "trunk"),
        "TP2 PP2 CP2 EP2": (f"{TP2} {PP2} {CP2} {EP2}", "mtp"),
    },
}

BF16_DISTRIBUTED = (
    f"--bf16 --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 20000 --grad-reduce-in-bf16 {PP2}"
)


@pytest.fixture(scope="module")
def trained(worlds, command):
    """world size -> name -> what the training recorded."""
    cases = {
        size: {name: command(flags, checkpoint=checkpoint) for name, (flags, checkpoint) in of_size.items()}
        for size, of_size in LAYOUTS.items()
    }
    cases[2] |= {
        "bf16": command(f"--bf16 {TP2}"),
        "bf16 distributed": command(BF16_DISTRIBUTED, checkpoint="mtp", steps=1),
        "bias update": command(f"{EP2} --moe-router-bias-update-rate 1e-2"),
    }
    given = {name: LIVE_WEIGHTS for of_size in LAYOUTS.values() for name in of_size}
    return {size: worlds.cases(size, of_size, given) for size, of_size in cases.items()}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_same_as_one_process(trained, one_process, size, name):
    checkpoint = LAYOUTS[size][name][1]
    assert_same_training(trained[size][name]["steps"], one_process[checkpoint]["steps"][:3])


@pytest.mark.parametrize(
    ("size", "name", "flags", "checkpoint"),
    [(size, name, *case) for size, of_size in LAYOUTS.items() for name, case in of_size.items()]
    + [(2, "bf16", f"--bf16 {TP2}", "trunk"), (2, "bf16 distributed", BF16_DISTRIBUTED, "mtp")],
)
def test_every_rank_holds_the_bytes_that_the_planner_says(trained, command, monkeypatch, size, name, flags, checkpoint):
    from exact_memory import exact_settings_of, static_memory

    from hymeg.training.arguments import parse
    from hymeg.training.preflight import layout_of

    monkeypatch.setenv("WORLD_SIZE", str(size))
    args, config = parse(command(flags, checkpoint=checkpoint))
    layout, settings = layout_of(args), exact_settings_of(args)
    for rank, found in enumerate(trained[size][name]["static"]):
        place = found["pipeline_rank"], (found["dense_rank"], found["expert_rank"])
        expected = static_memory(config, layout, settings, *place)
        for part in ("weights", "gradients", "optimizer", "buffers"):
            assert found[part] == getattr(expected, part), f"{part} of rank {rank}, {place}"


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """checkpoint -> layout -> digest of the files that conversion writes, there and back."""
    out, found = tmp_path_factory.mktemp("exported"), {}
    for checkpoint, layout in itertools.product(("trunk", "mtp"), HF_LAYOUTS):
        hf_to_dist(folder / checkpoint, out / "dist", overwrite=True)
        dist_to_hf(out / "dist", hf := out / f"{checkpoint}-{layout}", layout=layout)
        found.setdefault(checkpoint, {})[layout] = digest(load_file(hf / "model.safetensors").items())
    return found


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, of_size in LAYOUTS.items() for name in of_size])
def test_live_weights_are_those_of_the_files_to_the_bit_on_every_rank(trained, exported, size, name):
    assert trained[size][name]["live"] == [exported[LAYOUTS[size][name][1]]] * size


def test_multi_token_prediction_counts(one_process):
    """Were the MTP layer without effect, no layout test could fail on it."""
    assert largest_difference(one_process["mtp"]["steps"], one_process["trunk"]["steps"], "grad_norm") > 1e-3


def test_recompute_changes_nothing(one_process):
    assert_same_training(one_process["recompute"]["steps"], one_process["mtp"]["steps"][:3], tolerance=1e-6)


def test_micro_batch_size_changes_nothing(one_process):
    assert_same_training(one_process["large micro-batch"]["steps"], one_process["trunk"]["steps"][:3])


def test_bf16_trains_like_fp32_to_its_precision(one_process, trained):
    """bf16 has 8 bits: losses within 1 % of fp32's, in one process and under tensor parallelism."""
    for steps in (one_process["bf16"]["steps"], trained[2]["bf16"]["steps"]):
        difference = largest_difference(steps, one_process["trunk"]["steps"][:3], "loss")
        assert 0 < difference < 1e-2


def test_expert_bias_is_updated_over_the_whole_world_when_asked(one_process, trained):
    assert_same_training(trained[2]["bias update"]["steps"], one_process["bias update"]["steps"])
    assert largest_difference(one_process["bias update"]["steps"], one_process["trunk"]["steps"][:3], "loss") > 1e-5


def test_corrections_are_said(trained):
    assert any("--sequence-parallel" in note for note in trained[2]["TP2 SP"]["notes"])
