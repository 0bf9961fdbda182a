"""tools/plan.py: what it prints and writes, and one line for everything wrong."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import yaml
from published_models import PUBLISHED

from hymeg.errors import EXIT_CODE, UserError
from hymeg.hf.config import HyConfig
from hymeg.hf.tiny_checkpoint import TINY_CONFIG
from hymeg.planning.layout import Layout, check
from hymeg.planning.memory import Device
from hymeg.planning.network import HARDWARE
from hymeg.planning.search import Machine, Planner
from hymeg.planning.settings import Settings
from hymeg.platform.flags import for_gpus
from hymeg.training.arguments import parse

PLAN = Path(__file__).parents[2] / "tools" / "plan.py"
SPEC = importlib.util.spec_from_file_location("plan_command", PLAN)
plan_command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan_command)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    for name, shape in PUBLISHED.items():
        (folder / name).mkdir()
        HyConfig.from_dict(TINY_CONFIG | shape | {"max_position_embeddings": 262144}).save(folder / name)
    (folder / "unknown_key.yaml").write_text("tensor-model-parallel-sizes: 2\n")
    (folder / "too_large.yaml").write_text(
        "bf16: true\nseq-length: 4096\nglobal-batch-size: 64\nexpert-model-parallel-size: 8\n"
    )
    (folder / "illegal.yaml").write_text("seq-length: 4096\nglobal-batch-size: 64\ntensor-model-parallel-size: 3\n")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(places, monkeypatch, capsys):
    """`run("flags of plan.py")` -> (exit code, what it printed, what it complained of). `{mt}` is Hy-MT2's folder,
    `{hy3}` Hy3's, `{tmp}` the one above."""

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setenv("WORLD_SIZE", "1")  # the command sets its own; these are put back
        monkeypatch.setenv("RANK", "0")
        monkeypatch.chdir(places)
        # It would end the process.
        monkeypatch.setattr(plan_command, "exit_on_user_error", contextlib.nullcontext)
        code, complaint = 0, ""
        try:
            plan_command.main(line.format(mt=places / "Hy-MT2-30B-A3B", hy3=places / "Hy3", tmp=places).split())
        except UserError as error:
            code, complaint = EXIT_CODE, str(error)
        return code, capsys.readouterr().out, complaint

    return command


def listed(out: str) -> list[str]:
    """The lines of the layouts that fit."""
    return [line for line in out.partition("Not enough memory")[0].splitlines() if line[:1].isdigit() and "EP" in line]


MT = "--hf {mt} --gpus 16 --seq-length 4096 --global-batch-size 64"


def test_a_search_lists_what_fits_best_first(run):
    code, out, _ = run(f"{MT} --top 4")
    assert code == 0
    rows = [line.split() for line in listed(out)]
    times = [float(row[3]) for row in rows]
    assert len(rows) == 4 and times == sorted(times) and all(float(row[2]) >= 0 for row in rows)
    assert "Not enough memory for these" in out and "activations" in out


def test_a_given_flag_is_kept(run):
    code, out, _ = run(
        f"{MT} --expert-model-parallel-size 4 --tensor-model-parallel-size 2 --recompute-granularity full "
        "--recompute-method uniform "
        "--recompute-num-layers 1"
    )
    rows = listed(out)
    assert code == 0 and rows and all("TP2 " in row and " EP4 " in row and "full uniform 1" in row for row in rows)


def test_a_written_recipe_is_judged_alike(run, places):
    code, out, _ = run(f"{MT} --lr 1e-5 --write {{tmp}}/best.yaml --sbatch {{tmp}}/best.sbatch")
    assert code == 0
    best = next(line for line in out.splitlines() if line.startswith("1  "))
    code, again, err = run("--hf {mt} --config {tmp}/best.yaml --gpus 16")
    assert code == 0, err
    assert next(line for line in again.splitlines() if line.startswith("1  ")) == best
    assert float(yaml.safe_load((places / "best.yaml").read_text())["lr"]) == 1e-5
    assert (
        "sbatch --nodes 2" in (places / "best.sbatch").read_text()
        and "examples/slurm/train.sbatch" in (places / "best.sbatch").read_text()
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--sft --train-data-path a.jsonl 0.3 b.jsonl 0.7 --no-calculate-per-token-loss",
        "--sft --no-sft-packing --no-bf16 --attention-backend flash --no-overlap-grad-reduce",
        "--recompute-activations --data-path 2024-01-01 --split 99,1,0 --no-load-optim --lr 1e-5",
    ],
)
def test_a_written_recipe_says_what_was_typed(run, places, flags):
    code, _, err = run(f"{MT} {flags} --write {{tmp}}/typed.yaml")
    assert code == 0, err
    typed, model = flags.split(), ["--hf-model", str(places / "Hy-MT2-30B-A3B")]
    with for_gpus():
        expected = parse([*model, *typed])[0]
        found = parse([*model, "--config", str(places / "typed.yaml")])[0]
    for dest in [*expected.explicit, "sft_rows", "packed"]:
        assert getattr(found, dest) == getattr(expected, dest), dest
    assert found.seq_length == 4096 and found.global_batch_size == 64


def test_packed_conversations_keep_a_micro_batch_of_one(run):
    def micro_batches(flags: str) -> set[str]:
        return {
            line.partition("micro-batch ")[2].partition(",")[0] for line in listed(run(f"{MT} {flags} --top 40")[1])
        }

    assert micro_batches("--sft") == {"1"}
    assert len(micro_batches("--sft --no-sft-packing")) > 1


def test_a_recipe_that_fixes_a_part_is_searched(run, places):
    (places / "part.yaml").write_text("pipeline-model-parallel-size: 4\nglobal-batch-size: 64\nseq-length: 4096\n")
    code, out, _ = run("--hf {mt} --config {tmp}/part.yaml --search --gpus 16 --top 3")
    rows = listed(out)
    assert code == 0 and len(rows) == 3 and all("PP4" in row for row in rows)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--hf {mt} --seq-length 4096", ["--gpus"]),
        ("--gpus 8 --seq-length 4096", ["--hf is missing"]),
        ("--hf {mt} --gpus 0 --seq-length 4096 --global-batch-size 8", ["--gpus 0", "1 or more"]),
        ("--hf {mt} --gpus eight", ["--gpus", "eight"]),
        ("--hf {mt} --gpus 12 --seq-length 4096 --global-batch-size 64", ["--gpus 12", "nodes of 8", "8 or 16"]),
        ("--hf {mt} --gpus 88 --seq-length 4096 --global-batch-size 7", ["--gpus 88", "no legal layout"]),
        ("--hf {mt} --gpus 8 --global-batch-size 64", ["--seq-length is missing"]),
        ("--hf {mt} --gpus 8 --seq-length 4096", ["--global-batch-size is missing"]),
        ("--hf {mt} --gpus 8 --seq-length 4096 --global-batch-size 64 --gpu-memory 1", ["--gpu-memory 1", "4 or more"]),
        (
            "--hf {mt} --gpus 8 --seq-length 4096 --global-batch-size 64 --gpu-memory 24 --optimizer-offload-fraction "
            "0.1 --imbalance 2",
            ["--gpu-memory 24", "the least needs", "GiB a GPU"],
        ),
        ("--hf {mt} --gpus 8 --seq-length 4096 --global-batch-size 64 --gpu V100", ["--gpu V100", "H100"]),
        (
            "--hf {mt} --gpus 8 --seq-length 4096 --global-batch-size 64 --imbalance 0.5",
            ["--imbalance 0.5", "1 or more"],
        ),
        (
            "--hf {mt} --gpus 8 --seq-length 4096 --global-batch-size 64 --tensor-model-parallel-size 3",
            ["--tensor-model-parallel-size 3"],
        ),
        (f"{MT} --pipeline-model-parallel-size 5", ["--pipeline-model-parallel-size 5"]),
        (
            f"{MT} --num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 3",
            ["--num-virtual-stages-per-pipeline-rank 2", "keep one"],
        ),
        (f"{MT} --num-layers 12", ["--num-layers 12", "contradicts"]),
        (f"{MT} --tensor-parallel 2", ["--tensor-parallel", "--tensor-model-parallel-size"]),
        (f"{MT} --fp16", ["--fp16", "bf16"]),
        ("--hf {mt}/config.json --gpus 8", ["--hf", "config.json", "give the folder"]),
        (f"{MT} --sbatch job.sbatch", ["--sbatch", "--write"]),
        (f"{MT} --picture p.png", ["--picture", "--explain"]),
        (f"{MT} --search", ["--search", "--config"]),
        (f"{MT} --write {{tmp}}/nowhere/r.yaml", ["--write", "nowhere"]),
        ("--hf {tmp}/nowhere --gpus 8 --seq-length 4096 --global-batch-size 64", ["nowhere", "no such folder"]),
        ("--hf {tmp}/empty --gpus 8 --seq-length 4096 --global-batch-size 64", ["config.json"]),
        ("--hf {mt} --gpus 8 --config {tmp}/nowhere.yaml", ["nowhere.yaml"]),
        (
            "--hf {mt} --gpus 8 --config {tmp}/unknown_key.yaml",
            ["line 1", "tensor-model-parallel-sizes", "tensor-model-parallel-size"],
        ),
        ("--hf {mt} --gpus 8 --config {tmp}/illegal.yaml", ["--tensor-model-parallel-size 3", "illegal.yaml, line 3"]),
        ("--hf {mt} --gpus 8 --config {tmp}/too_large.yaml", ["--gpu-memory 80", "needs", "stage 0"]),
    ],
)
def test_wrong_input_is_one_line(run, line, words):
    code, _, complaint = run(line)
    assert code == 2 and len(complaint.splitlines()) == 1, complaint
    for word in words:
        assert word in complaint


def test_a_search_lists_legal_layouts_only_and_keeps_experts_in_a_node():
    config = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1})
    machine = Machine(64, 8, Device(141), HARDWARE["H200"])
    free = set(plan_command.CHOSEN) - {"context_parallel_size", "micro_batch_size"}
    found = Planner(config, machine).search(Layout(64, 4096, 256), free, Settings(), set())
    for plan in found.fitting:
        check(config, plan.layout)
        assert plan.layout.expert_model_parallel_size * plan.layout.expert_tensor_parallel_size <= 8
    assert len(found.fitting) == found.num_fitting > 20
    across = Planner(config, machine, experts_across_nodes=True).search(Layout(64, 4096, 256), free, Settings(), set())
    assert any(plan.layout.expert_model_parallel_size > 8 for plan in across.fitting)


def test_numerics_change_only_where_nothing_else_fits():
    """Hy-MT2 on 8 GPUs: on 80 GiB fp32 state fits, on 56 it does not, on 40 only the host's memory is left."""
    config = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"])
    expected = {80: (True, False), 56: (False, False), 40: (True, True)}
    for memory, (grads_in_fp32, offload) in expected.items():
        planner = Planner(config, Machine(8, 8, Device(memory), HARDWARE["H100"]))
        for plan in planner.search(Layout(8, 4096, 64), set(plan_command.CHOSEN), Settings(), set()).fitting:
            assert (plan.settings.grads_in_fp32, plan.settings.optimizer_cpu_offload) == (grads_in_fp32, offload), (
                memory
            )
