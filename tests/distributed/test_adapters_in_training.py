"""Adapters train in every layout as in one process: losses, gradient norms, and every number of A and B after four
steps, to 1e-5; copies of them to the bit. The base is frozen and costs neither gradients nor optimizer."""

import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from live_weights import digest
from safetensors.torch import load_file, save_file
from test_conversations import write_rows
from test_layouts import CP2, EP2, PP2, TP2, VPP2
from worlds import assert_same_training, largest_difference

from hymeg.checkpoint.adapter_settings import AdapterSettings
from hymeg.checkpoint.adapter_table import adapter_modules, check_adapter_tensors
from hymeg.checkpoint.adapters import adapter_to_peft, merge, peft_to_adapter
from hymeg.checkpoint.convert import hf_to_dist
from hymeg.checkpoint.metadata_file import stored_shapes
from hymeg.checkpoint.sources import open_adapter
from hymeg.checkpoint.verification import verify_folder
from hymeg.errors import UserError
from hymeg.hf.config import HyConfig

RANK, STEPS = 4, 4
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
MTP_TARGETS = "mtp.q_proj mtp.o_proj mtp.shared_mlp.up_proj mtp.experts.gate_proj mtp.experts.down_proj"
# A large epsilon: Adam would make a number's rounding its sign where gradients are next to nothing.
RATE = "--lr 2e-2 --adam-eps 1e-3 --clip-grad 0.5"
BATCH = "--global-batch-size 2"
LORA = f"--lora-rank {RANK} --lora-alpha 8 {RATE} {BATCH} --lora-targets {TARGETS}"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MODULES = "--recompute-granularity selective --recompute-modules core_attn mlp moe shared_experts"
DISTRIBUTED = "--use-distributed-optimizer"

LAYOUTS = {  # world size -> name -> flags, checkpoint
    2: {
        "TP2 SP": (TP2, "mtp"),
        "PP2 VPP2": (f"{PP2} {VPP2}", "mtp"),
        "ETP2": ("--expert-tensor-parallel-size 2", "trunk"),
        "CP2": (CP2, "trunk"),
        "DP2 distributed optimizer, overlaps": (f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather", "trunk"),
    },
    4: {"TP2 EP2": (f"{TP2} {EP2} {DISTRIBUTED}", "mtp")},
}
MORE = {  # the same, in nightly runs
    2: {
        "PP2": (PP2, "mtp"),
        "DP2, modules recomputed": (MODULES, "trunk"),
        "TP2 ETP1, all recomputed": (f"{TP2} --expert-tensor-parallel-size 1 {FULL}", "trunk"),
        "EP2": (EP2, "trunk"),
        "EP2 allgather": (f"{EP2} --moe-token-dispatcher-type allgather", "mtp"),
        "DP2": ("", "mtp"),
    },
    4: {
        "TP2 PP2": (f"{TP2} {PP2} {FULL}", "trunk"),
        "TP2 EP2 ETP1": (f"{TP2} {EP2} --expert-tensor-parallel-size 1", "trunk"),
        "EP2 CP2": (f"{EP2} {CP2}", "mtp"),
    },
    8: {"TP2 PP2 EP2": (f"{TP2} {PP2} {EP2} {DISTRIBUTED}", "trunk")},
}
CASES = [pytest.param(size, *case, id=name) for size, of_size in LAYOUTS.items() for name, case in of_size.items()]
CASES += [
    pytest.param(size, *case, id=name, marks=pytest.mark.soak)
    for size, of_size in MORE.items()
    for name, case in of_size.items()
]


def lora(command, flags: str = "", checkpoint: str = "trunk", steps: int = STEPS, **others) -> list[str]:
    targets = f" {MTP_TARGETS}" if checkpoint == "mtp" else ""
    return command(f"{LORA}{targets} {flags}", checkpoint=checkpoint, steps=steps, **others)


@pytest.fixture(scope="module")
def alone(worlds, command):
    return worlds.cases(1, {checkpoint: lora(command, checkpoint=checkpoint) for checkpoint in ("trunk", "mtp")})


def assert_same_adapters(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and found
    for key, adapter in expected.items():
        a, b = (torch.tensor(one["values"], dtype=torch.float64) for one in (found[key], adapter))
        assert found[key]["shape"] == adapter["shape"]
        assert b.norm() > 0, f"{key} is nothing"
        assert found[key]["apart"] == 0, f"copies of {key} are {found[key]['apart']} apart"
        assert (a - b).norm() / b.norm() <= tolerance, f"{key} differs by {(a - b).norm() / b.norm():.1e}"


@pytest.mark.parametrize(("size", "flags", "checkpoint"), CASES)
def test_same_as_one_process(worlds, command, alone, size, flags, checkpoint):
    found, expected = worlds.run(size, lora(command, flags, checkpoint)), alone[checkpoint]
    assert_same_training(found["steps"], expected["steps"])
    assert_same_adapters(found["adapters"], expected["adapters"])
    assert found["live"] == [{"adapters": digest(served(found["adapters"]))}] * size


def served(adapters: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """What every rank is to be given of its model's adapters, under the names that vLLM reads."""
    for key, found in adapters.items():
        whole, (path, matrix) = torch.tensor(found["values"]).view(found["shape"]), key[8:].rsplit(".", 1)
        if path.startswith("model.layers.4."):  # MTP
            continue
        above, _, name = path.rpartition(".")
        paths = [f"{above}.{e}.{name}" for e in range(len(whole))] if whole.dim() == 3 else [path]
        parts = whole.view(len(paths), *whole.shape[-2:])
        yield from ((f"base_model.model.{p}.{matrix}.weight", part) for p, part in zip(paths, parts, strict=True))


def test_adapters_and_nothing_else_learn(alone, worlds, command):
    """The first loss is the base's, as B is zero; then they part from it, as far as learning goes."""
    steps, [of_base] = alone["trunk"]["steps"], worlds.run(1, command(BATCH, steps=1))["steps"]
    assert steps[0]["loss"] == pytest.approx(of_base["loss"], rel=1e-6)
    still = worlds.run(1, lora(command, "--lr 0 --min-lr 0"))
    assert largest_difference(still["steps"], steps, "loss") > 1e-3
    assert all(torch.tensor(one["values"]).abs().max() > 0 for one in alone["mtp"]["adapters"].values())


def test_the_base_has_neither_gradients_nor_optimizer_states(alone):
    """In bytes, of all that the trainer holds."""
    held, adapters = alone["trunk"]["static"][0], alone["trunk"]["adapters"]
    trained = sum(len(one["values"]) for one in adapters.values())
    assert held["gradients"] == 4 * trained
    assert held["optimizer"] == 8 * trained
    [said] = [note for note in alone["trunk"]["notes"] if note.startswith("training ")]
    frozen = held["weights"] // 4 - trained
    assert said.startswith(f"training {trained:,} parameters in adapters of rank {RANK} beside {frozen:,} frozen ones ")
    assert said.endswith(f"({trained / frozen:.2%}): {', '.join(TARGETS.split())}")


PAIRS = {  # name -> saved under, resumed under
    "TP2 to EP2": (f"{TP2} {DISTRIBUTED}", f"{EP2} {DISTRIBUTED}"),
    "PP2 VPP2 to ETP2": (f"{PP2} {VPP2}", "--expert-tensor-parallel-size 2"),
}


@pytest.mark.parametrize(
    "name", [next(iter(PAIRS)), *(pytest.param(n, marks=pytest.mark.soak) for n in list(PAIRS)[1:])]
)
def test_resumed_in_another_layout_goes_on_as_if_nothing_had_happened(worlds, command, folder, alone, name):
    """The optimizer's state included; the base is found again without being named."""
    before, after = PAIRS[name]
    save = folder / "adapters" / name.replace(" ", "-")
    saved = worlds.run(2, lora(command, f"{before} --save {save}", steps=2))
    resumed = worlds.run(2, lora(command, after, load=str(save)))
    expected = alone["trunk"]
    assert_same_training(saved["steps"], expected["steps"][:2])
    assert_same_training(resumed["steps"], expected["steps"][2:])
    assert_same_adapters(resumed["adapters"], expected["adapters"])
    adapter_to_peft(save, save.with_suffix(".peft"), layout="served", base_hf=folder / "trunk", workers=1)
    exported = load_file(save.with_suffix(".peft") / "adapter_model.safetensors")
    assert [live["adapters"] for live in saved["live"]] == [digest(exported.items())] * 2


def test_a_save_holds_the_adapters_alone(worlds, command, folder, tmp_path):
    """Under the keys of the table, and the settings beside them, in the manifest as the tensors are: read or verified,
    a bit that flipped in the settings is found."""
    save = folder / "adapters" / next(iter(PAIRS)).replace(" ", "-")
    worlds.run(2, lora(command, f"{PAIRS['TP2 to EP2'][0]} --save {save}", steps=2))
    saved = save / "iter_0000002"
    shapes = {key: shape for key, shape in stored_shapes(str(saved)).items() if shape is not None}
    of_model = {key: shape for key, shape in shapes.items() if not key.startswith("optimizer")}
    settings = AdapterSettings.from_folder(saved)
    check_adapter_tensors(HyConfig.from_dir(folder / "trunk"), RANK, TARGETS.split(), of_model)
    assert (settings.rank, settings.alpha, settings.scale, settings.dropout) == (RANK, 8.0, 2.0, 0.0)
    assert settings.targets == tuple(TARGETS.split())
    assert settings.base["source"] == str(folder / "trunk") and len(settings.base["fingerprint"]) == 12
    shutil.copytree(saved, tmp_path / "flipped")
    flipped = tmp_path / "flipped" / "adapter.json"
    flipped.write_text(flipped.read_text().replace('"alpha": 8.0', '"alpha": 9.0'))
    assert [finding.path for finding in verify_folder(tmp_path / "flipped", workers=1).damaged] == [flipped]
    with pytest.raises(UserError, match=r"adapter\.json: damaged"):
        AdapterSettings.from_folder(tmp_path / "flipped")


def test_damaged_adapters_are_fallen_back_from(worlds, command, tmp_path):
    save = tmp_path / "saved"
    worlds.run(2, lora(command, f"{DISTRIBUTED} --save {save} --save-interval 1", steps=2))
    damaged = sorted((save / "iter_0000002").glob("*.distcp"))[0]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 16
    damaged.write_bytes(data)
    found = worlds.run(2, lora(command, f"{DISTRIBUTED} --fall-back-to-older-checkpoint", load=str(save), steps=3))
    assert len(found["steps"]) == 2
    assert any(f"{damaged}: damaged: falling back to iteration 1" in note for note in found["notes"])


def test_the_base_is_found_again_at_the_iteration_that_it_was_loaded_from(worlds, command, tmp_path):
    """Where it is a run's folder, whose tracker names a later one."""
    base, save = tmp_path / "base", tmp_path / "saved"
    worlds.run(1, command(f"{DISTRIBUTED} --save {base} --save-interval 1", steps=2))
    worlds.run(1, lora(command, f"{DISTRIBUTED} --save {save} --ckpt-step 1", load=str(base), steps=1))
    assert len(worlds.run(1, lora(command, DISTRIBUTED, load=str(save), steps=2))["steps"]) == 1


def test_another_base_is_refused(worlds, command, folder, tmp_path):
    """Whose weights differ in one number; the same weights from a distributed checkpoint are taken. In a resume and in
    a merge.
    """
    save = folder / "adapters" / next(iter(PAIRS)).replace(" ", "-")
    worlds.run(2, lora(command, f"{PAIRS['TP2 to EP2'][0]} --save {save}", steps=2))
    hf_to_dist(folder / "trunk", tmp_path / "dist")
    load = ["--pretrained-checkpoint", str(tmp_path / "dist")]
    same = worlds.run(1, [*lora(command, DISTRIBUTED, load=str(save), steps=3), *load])
    assert len(same["steps"]) == 1
    other = tmp_path / "another"
    shutil.copytree(folder / "trunk", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.experts.5.down_proj.weight"][3, 7] *= 1.1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(AssertionError, match="its adapters were trained on other weights than"):
        worlds.run(1, [*lora(command, DISTRIBUTED, load=str(save), steps=3), "--pretrained-checkpoint", str(other)])
    said = []
    merge(folder / "trunk", save, tmp_path / "merged", say=said.append)
    assert not any("not checked" in line for line in said) and (tmp_path / "merged" / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"trained on other weights than .*another holds .* give their base, .*trunk"):
        merge(other, save, tmp_path / "into-another")
    assert not (tmp_path / "into-another").exists()


ALSO = "--train-also *norm* *.router.* lm_head.weight model.embed_tokens.weight --lora-targets q_proj experts.up_proj"


def test_small_parts_trained_in_full_beside_the_adapters(worlds, command, folder, tmp_path):
    """Like the adapters: in another layout, saved, resumed under a third; and merged as the save's run ends."""
    alone = worlds.run(1, lora(command, ALSO, "mtp"))["adapters"]
    before = load_file(folder / "mtp" / "model.safetensors")
    in_full = {key: one for key, one in alone.items() if key.endswith(".full")}
    names = {key.removeprefix("adapter.").removesuffix(".full") for key in in_full}
    assert {name for name in before if "norm" in name or "router" in name} < names and "lm_head.weight" in names
    for key, one in in_full.items():
        was = before[key.removeprefix("adapter.").removesuffix(".full")]
        assert one["shape"] == list(was.shape) and one["values"] != was.flatten().tolist()
    saved = worlds.run(2, lora(command, f"{ALSO} {TP2} {DISTRIBUTED} --save {tmp_path}/saved", "mtp", steps=2))
    resumed = worlds.run(2, lora(command, f"{ALSO} {PP2} {DISTRIBUTED}", "mtp", load=str(tmp_path / "saved")))
    assert_same_adapters(resumed["adapters"], alone)
    merge(folder / "mtp", tmp_path / "saved", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name in names:
        values = saved["adapters"][f"adapter.{name}.full"]["values"]
        assert after[name].flatten().tolist() == values and values != before[name].flatten().tolist()
    adapter_to_peft(tmp_path / "saved", tmp_path / "peft", base_hf=folder / "mtp")
    peft_to_adapter(tmp_path / "peft", tmp_path / "again", base_hf=folder / "mtp")
    again, in_trunk = open_adapter(tmp_path / "again"), {name for name in names if ".layers.4." not in name}
    assert set(again.full) == in_trunk < names
    other = lora(command, f"{ALSO.replace('*.router.*', '')} {DISTRIBUTED}", "mtp", load=str(tmp_path / "saved"))
    with pytest.raises(AssertionError, match=r"--train-also: the adapters in .* were made with .* trained in full,"):
        worlds.run(1, other)


def test_packed_conversations(worlds, command, folder):
    write_rows(folder / "adapter_rows.jsonl", 16, seed=3)

    def packed(flags: str) -> list[str]:
        argv = lora(command, flags, steps=2)
        start = argv.index("--data-path")
        argv[start : start + 2] = ["--sft", "--data-path", str(folder / "adapter_rows.jsonl")]
        argv[argv.index("--seq-length") + 1] = "192"
        return argv

    found, expected = worlds.run(2, packed(f"{TP2} --expert-tensor-parallel-size 2")), worlds.run(1, packed(""))
    assert_same_training(found["steps"], expected["steps"])
    assert_same_adapters(found["adapters"], expected["adapters"])


def test_ranks_that_hold_the_same_tokens_drop_the_same(worlds, command):
    """Under expert tensor parallelism the two ranks' experts are given the same tokens; all else is parts of them."""
    flags = f"{TP2} --expert-tensor-parallel-size 2 --lora-dropout 0.5"
    first, second = worlds.run(2, lora(command, flags, steps=1), "adapter_masks")["ranks"]
    assert len(first) == len(second)
    kinds = set()
    for (of_experts, is_row, shape, mask), other in zip(first, second, strict=True):
        assert other[:3] == [of_experts, is_row, shape]
        if shape[0] > 0:
            assert (mask == other[3]) == (of_experts and not is_row), (of_experts, is_row, shape)
            kinds.add((of_experts, is_row))
    assert len(kinds) == 4


def test_layers_that_are_recomputed_drop_what_they_dropped(worlds, command):
    """The first one of a run, too, before which the experts' random numbers were not there."""
    recomputed = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found, expected = (
        worlds.run(1, lora(command, f"--lora-dropout 0.5 {flags}", steps=2)) for flags in (recomputed, "")
    )
    assert_same_training(found["steps"], expected["steps"])
    assert_same_adapters(found["adapters"], expected["adapters"])


def test_the_update_is_told_by_its_size_against_the_weights(worlds, command, alone, folder):
    """As B A itself says, over the layers."""
    layout = f"{TP2} --expert-tensor-parallel-size 2"
    said = worlds.run(2, lora(command, f"{layout} --log-interval 1"))["said"]
    (line,) = [line for line in said if "update against weights" in line]
    found = {name: float(ratio) for name, ratio in re.findall(r"([\w.]+) (\d\.\d\de[+-]\d\d)", line)}
    weights, adapters = load_file(folder / "trunk" / "model.safetensors"), alone["trunk"]["adapters"]
    squares = {}
    for module in adapter_modules(HyConfig.from_dir(folder / "trunk"), TARGETS.split()):
        a, b = (torch.tensor(adapters[k]["values"]).view(adapters[k]["shape"]) for k in (module.lora_a, module.lora_b))
        names = [module.weight(e) for e in range(module.num_experts)] if module.num_experts else [module.weight()]
        both = squares.setdefault(module.target, [0.0, 0.0])
        both[0] += (2.0 * b @ a).square().sum().item()
        both[1] += sum(weights[name].square().sum().item() for name in names)
    assert found == {name: pytest.approx((d / w) ** 0.5, rel=1e-2) for name, (d, w) in squares.items()}


def test_adapters_that_do_not_move_are_said(worlds, command):
    still = worlds.run(1, lora(command, "--lr 0 --min-lr 0", steps=11))["said"]
    (line,) = [line for line in still if "have not moved" in line]
    assert "37 of 37" in line and "model.layers.0.self_attn.q_proj" in line
