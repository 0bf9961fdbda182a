"""Where adapters that are trained on come from, and what of the command line must be as it was when they were made."""

import pytest
from adapter_files import random_adapter, save_adapter

from hymeg import platform

platform.install()

from hymeg.checkpoint.adapter_settings import AdapterSettings  # noqa: E402
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint  # noqa: E402
from hymeg.errors import UserError  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import preflight  # noqa: E402

MADE = "--lora-rank 2 --lora-alpha 8 --lora-targets q_proj v_proj"
FULL = ("model.norm.weight",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, adapters of it, and adapters with a norm trained in full."""
    base = tmp_path_factory.mktemp("adapters") / "base"
    config = write_tiny_checkpoint(base)
    found = {"base": str(base), "nowhere": f"{base}-gone"}
    for name, source, full in (("plain", base, ()), ("full", base, FULL), ("lost", f"{base}-gone", ())):
        settings = AdapterSettings(2, 8.0, "lora", 0.0, ("q_proj", "v_proj"), {"source": str(source)})
        tensors = random_adapter(config, settings, full)
        found[name] = str(save_adapter(base.parent / name, config, settings, tensors))
    return found


@pytest.fixture
def checked(folders, monkeypatch):
    def check(words: str):
        monkeypatch.setenv("RANK", "0")
        needed = "--hf-model {base} --mock-data --seq-length 32 --train-iters 10 --lr 1e-4 --eval-iters 0"
        args, config = parse(f"{needed} {words}".format(**folders).split())
        notes = []
        preflight(args, config, notes.append)
        return args, notes

    return check


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{MADE} --lora-rank 4", "--lora-rank 4: the adapters in {plain}/iter_0000005 were made with --lora-rank 2"),
        ("--lora-rank 2 --lora-targets q_proj v_proj", "--lora-alpha 4: the adapters in .* with --lora-alpha 8.0;"),
        (f"{MADE} --lora-scaling rslora", "--lora-scaling rslora: the adapters in .* with --lora-scaling lora;"),
        (f"{MADE} k_proj", "--lora-targets k_proj q_proj v_proj: the adapters .* with --lora-targets q_proj v_proj;"),
        (f"{MADE} --train-also {FULL[0]}", f"--train-also: .* were made with none trained in full, not {FULL[0]};"),
        (f"{MADE} --use-distributed-optimizer", "--load {plain}: its optimizer was saved in fp32 without --use-dist"),
    ],
)
def test_what_was_made_otherwise_is_refused(checked, folders, words, said):
    with pytest.raises(UserError, match=said.format(**folders)):
        checked(f"--load {{plain}} {words}")


@pytest.mark.parametrize("alpha", ["0.5", "1"])
def test_adapters_may_count_little(checked, alpha):
    assert checked(f"--load {{base}} --lora-rank 2 --lora-alpha {alpha}")[0].lora_record == {}


@pytest.mark.parametrize("words", [MADE, f"{MADE} --use-distributed-optimizer --no-load-optim", f"{MADE} --finetune"])
def test_what_agrees_is_resumed_on_the_base_that_they_were_made_of(checked, folders, words):
    args, notes = checked(f"--load {{plain}} {words}")
    assert (args.load, args.hf_weights, args.lora_base) == (folders["plain"], folders["base"], None)
    assert args.lora_record == {"source": folders["base"]} and args.exit_on_missing_checkpoint
    assert any(note.startswith("training ") for note in notes)


def test_what_is_trained_in_full_beside_them_is_said_again(checked):
    checked(f"--load {{full}} {MADE} --train-also {FULL[0]}")
    with pytest.raises(UserError, match=f"were made with {FULL[0]} trained in full, not none;"):
        checked(f"--load {{full}} {MADE}")


def test_a_base_that_is_gone_must_be_given(checked, folders):
    with pytest.raises(UserError, match=f"whose base is not found in {folders['nowhere']}; give it by --pretrained-ch"):
        checked(f"--load {{lost}} {MADE}")
    args, _ = checked(f"--load {{lost}} --pretrained-checkpoint {{base}} {MADE}")
    assert (args.load, args.hf_weights) == (folders["lost"], folders["base"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--init-from-scratch", "--init-from-scratch with --lora-rank: adapters of chance's weights serve nothing"),
        ("--load {base} --moe-router-bias-update-rate 1e-3", "--moe-router-bias-update-rate 0.001: it would change"),
        ("--load {base} --lora-alpha 0", "--lora-alpha 0.0: it must be above 0"),
        ("--load {base} --lora-targets qproj", "--lora-targets: "),
    ],
)
def test_what_makes_no_adapters_is_refused(checked, words, said):
    with pytest.raises(UserError, match=said):
        checked(f"--lora-rank 2 {words}")


def test_adapters_of_another_model_are_refused(checked, folders, tmp_path):
    config = HyConfig.from_dict(TINY_CONFIG | {"hidden_size": 32})
    settings = AdapterSettings(2, 8.0, "lora", 0.0, ("q_proj", "v_proj"), {"source": folders["base"]})
    other = save_adapter(tmp_path / "adapters", config, settings, random_adapter(config, settings))
    with pytest.raises(UserError, match=f"--load {other}: .*q_proj"):
        checked(f"--load {other} {MADE}")
