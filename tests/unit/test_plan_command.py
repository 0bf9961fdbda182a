"""tools/plan.py: what it prints and writes, and one line for everything wrong."""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from published_models import PUBLISHED

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.errors import EXIT_CODE, UserError
from hymeg.hf.config import HyConfig
from hymeg.planning import report, search
from hymeg.planning.flops import PEAK_TFLOPS
from hymeg.planning.layout import Layout, check
from hymeg.planning.memory import GIB, Device, memory_by_stage
from hymeg.planning.network import HARDWARE, hardware_of
from hymeg.planning.search import Machine, Planner, describe
from hymeg.planning.settings import UNMODELLED, Settings, unmodelled
from hymeg.platform import for_gpus
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
    (folder / "hidden.yaml").write_text(
        "bf16: true\nseq-length: 4096\nglobal-batch-size: 64\noverlap-moe-expert-parallel-comm: true\n"
        "expert-model-parallel-size: 4\npipeline-model-parallel-size: 2\n"
    )
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


CUT = "--tensor-model-parallel-size 1 --context-parallel-size 1 --expert-tensor-parallel-size 1"
"""A full search takes seconds; fixed so, a tenth of one."""
BATCH = "--seq-length 4096 --global-batch-size 64"
MT = f"--hf {{mt}} --gpus 16 {BATCH} {CUT}"
EIGHT = f"--hf {{mt}} --gpus 8 {BATCH} {CUT} --pipeline-model-parallel-size 1"


def test_a_search_lists_what_fits_best_first(run):
    code, out, _ = run(f"{MT} --top 4")
    assert code == 0
    rows = [line.split() for line in listed(out)]
    times = [float(row[4]) for row in rows]
    assert len(rows) == 4 and times == sorted(times) and all(float(row[2]) >= 0 for row in rows)
    assert "Not enough memory for these" in out and "activations" in out


def test_a_given_flag_is_kept(run):
    flags = "--expert-model-parallel-size 4 --recompute-granularity full --recompute-method uniform"
    code, out, _ = run(f"{MT} {flags} --recompute-num-layers 1")
    rows = listed(out)
    assert code == 0 and rows and all("TP1 " in row and " EP4 " in row and "full uniform 1" in row for row in rows)


def test_an_estimate_says_what_it_rests_on(run):
    _, out, _ = run(f"{EIGHT} --imbalance 1.3")
    assert "Assumed: 1.3 x the mean tokens on the busiest expert-parallel rank" in out and "6.2 GiB of reserve" in out
    assert "Not measured on any GPU" in out and "rows of" not in out
    assert "rows of 512 tokens" in run(f"{EIGHT} --sft")[1]
    # The mean square over the mean: what a token's row has, in the mean over tokens.
    assert "rows of 900 tokens" in run(f"{EIGHT} --sft --row-length 400:600")[1]
    assert "rows of 400 tokens" in run(f"{EIGHT} --sft --row-length 400")[1]


def test_short_rows_make_a_step_shorter(run):
    def seconds(flags: str) -> float:
        return json.loads(run(f"{EIGHT} --sft --json {flags}")[1])["plans"][0]["time"]["total"]

    assert seconds("--row-length 100") < seconds("") < seconds("--row-length 4096")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--fp8-format hybrid", "--fp8-format hybrid"),
        ("--moe-token-dispatcher-type allgather", "--moe-token-dispatcher-type allgather"),
        ("--moe-expert-capacity-factor 4 --moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor 4"),
        ("--moe-expert-capacity-factor 4 --moe-pad-expert-input-to-capacity", "--moe-pad-expert-input-to-capacity"),
        ("--optimizer sgd", "--optimizer sgd"),
        ("--attention-backend unfused", "--attention-backend"),
        ("--tp-comm-overlap", "--tp-comm-overlap"),
        ("--no-bias-swiglu-fusion", "--no-bias-swiglu-fusion"),
        ("--no-gradient-accumulation-fusion", "--no-gradient-accumulation-fusion"),
        ("--freeze *.experts.* *.router.*", "--freeze *.experts.* *.router.*"),
        ("--train-only *.router.*", "--train-only *.router.*"),
    ],
)
def test_flags_that_the_model_does_not_know_stand_on_the_first_line(run, flags, named):
    first = run(f"{EIGHT} {flags}")[1].splitlines()[0]
    assert first.startswith("Not modelled") and named in first.replace(",", " ")
    assert named in json.dumps(json.loads(run(f"{EIGHT} {flags} --json")[1])["not_modelled"])


def test_without_such_flags_nothing_is_said_and_the_table_names_flags_that_exist(run, places):
    assert "Not modelled" not in run(f"{EIGHT} --attention-backend flash")[1]
    with for_gpus():
        args, _ = parse(["--hf-model", str(places / "Hy-MT2-30B-A3B"), "--bf16"])
    assert vars(args).keys() >= UNMODELLED.keys() and unmodelled(args) == []


def test_json_has_what_the_tables_have(run):
    _, out, _ = run(f"{MT} --top 2 --explain 2")
    code, printed, _ = run(f"{MT} --top 1 --explain 2 --json")  # what is explained is there, however few are listed
    data = json.loads(printed)
    assert code == 0 and len(data["plans"]) == 2 and data["num_fitting"] > 2 and data["machine"]["num_gpus"] == 16
    second = data["plans"][1]
    row = listed(out)[1].split()
    figures = [second["peak_bytes"] / GIB, second["margin_bytes"] / GIB, second["time"]["total"]]
    assert [f"{figures[0]:.1f}", f"{figures[1]:.1f}", f"{figures[2]:.2f}"] == [row[1], row[2], row[4]]
    assert second["layout"] in out and second["flags"]["seq-length"] == 4096 and second["fits"]
    for number, stage in enumerate(second["stages"]):
        cells = [str(number), *(f"{stage[part] / GIB:.2f}" for part in stage)]
        assert any(line.split()[: len(cells)] == cells for line in out.splitlines()), cells
    host = second["host_bytes_a_node"]
    assert f"at a save {host['save'] / GIB:.0f}, at a load {host['load'] / GIB:.0f}, offloaded 0." in out
    assert max(stage["total"] for stage in second["stages"]) == second["peak_bytes"]
    assert len(data["too_large"]) == 3 and data["assumptions"]["imbalance"] == 1.2


PLAIN = "--no-distrib-optim-fully-reshardable-mem-efficient"


def test_a_node_without_the_memory_for_a_checkpoint_is_warned_of(run):
    """Hy-MT2 over eight expert-parallel ranks: 12 bytes an element on each of eight ranks as it loads."""
    layout = f"--hf {{mt}} --gpus 16 {BATCH} {CUT} --pipeline-model-parallel-size 2 --expert-model-parallel-size 8"
    _, out, _ = run(f"{layout} --host-memory 100")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert "--host-memory 100" in warning and "--no-dist-ckpt-optim-fully-reshardable" in warning
    assert "warning" not in run(f"{layout} --host-memory 1000")[1] and "warning" not in run(layout)[1]
    sharded = run(f"{layout} --host-memory 200 --no-dist-ckpt-optim-fully-reshardable")[1]
    assert "warning" not in sharded
    assert "memory-efficient" not in run(f"{layout} --explain {PLAIN}")[1]


def test_a_gpu_without_the_memory_for_a_save_is_warned_of(run):
    """Gathered on the GPUs, a buffer of all expert weights in fp32 does not fit beside what the GPU keeps."""
    fixed = f"{EIGHT} --expert-model-parallel-size 8 --recompute-granularity full --recompute-method uniform"
    fixed += " --recompute-num-layers 1 --use-precision-aware-optimizer"
    assert "a save gathers" in run(f"{fixed} {PLAIN}")[1]
    assert "a save gathers" not in run(f"{fixed} --distrib-optim-fully-reshardable-mem-efficient")[1]


def test_a_written_recipe_is_judged_alike(run, places):
    code, out, _ = run(f"{MT} --lr 1e-5 --write {{tmp}}/best.yaml --sbatch {{tmp}}/best.sbatch")
    assert code == 0
    best = next(line for line in out.splitlines() if line.startswith("1  "))
    code, again, err = run("--hf {mt} --config {tmp}/best.yaml --gpus 16")
    assert code == 0, err
    assert next(line for line in again.splitlines() if line.startswith("1  ")) == best
    written = (places / "best.yaml").read_text()
    assert float(yaml.safe_load(written)["lr"]) == 1e-5 and written.startswith("# 16 GPUs, H100 with 80 GiB, 8 a node")
    job = (places / "best.sbatch").read_text()
    assert "sbatch --nodes 2" in job and "examples/slurm/train.sbatch" in job


@pytest.mark.parametrize(
    "flags",
    [
        "--sft --train-data-path a.jsonl 0.3 b.jsonl 0.7 --no-rope-fusion",
        "--sft --no-sft-packing --no-bf16 --attention-backend flash --no-overlap-grad-reduce --no-overlap-param-gather",
        "--recompute-activations --data-path 2024-01-01 --split 99,1,0 --no-load-optim --lr 1e-5",
    ],
)
def test_a_written_recipe_says_what_was_typed(run, places, flags):
    code, _, err = run(f"{MT} {flags} --write {{tmp}}/typed.yaml")
    assert code == 0, err
    typed, model = flags.split(), ["--hf-model", str(places / "Hy-MT2-30B-A3B")]
    with for_gpus():
        expected = parse([*model, *typed], is_whole=False)[0]
        found = parse([*model, "--config", str(places / "typed.yaml")], is_whole=False)[0]
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
    code, out, _ = run(f"--hf {{mt}} --config {{tmp}}/part.yaml --search --gpus 16 --top 3 {CUT}")
    rows = listed(out)
    assert code == 0 and len(rows) == 3 and all("PP4" in row for row in rows)


def test_explaining_writes_no_file(run, places):
    before = set(places.iterdir())
    code, out, _ = run(f"{EIGHT} --explain")
    assert code == 0 and "GiB of a GPU, by pipeline stage:" in out and "Seconds of a step" in out
    assert set(places.iterdir()) == before


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
            f"{EIGHT} --gpu H100 --gpu-memory 24 --optimizer-offload-fraction 0.1 --imbalance 2",
            ["--gpu-memory 24", "the least needs", "GiB a GPU"],
        ),
        (f"{EIGHT} --gpu-memory 40", ["--gpu-memory 40", "--gpu: ", "A100 (80)", "H200 (141)"]),
        (f"{EIGHT} --host-memory 0", ["--host-memory 0", "1 or more"]),
        (f"{EIGHT} --margin -1", ["--margin -1", "0 or more"]),
        (f"{EIGHT} --margin 70", ["no layout of", "the least needs"]),
        (f"{EIGHT} --row-length 400", ["--row-length 400", "--sft"]),
        (f"{EIGHT} --sft --row-length 400:300", ["--row-length 400:300", "root mean square"]),
        (f"{EIGHT} --sft --row-length 5000", ["--row-length 5000", "--seq-length 4096"]),
        (f"{EIGHT} --sft --row-length some", ["--row-length some", "mean length in tokens"]),
        (
            f"{EIGHT} --expert-model-parallel-size 1 --overlap-moe-expert-parallel-comm",
            ["no legal layout", "--overlap-moe-expert-parallel-comm"],
        ),
        (
            f"{EIGHT} --overlap-moe-expert-parallel-comm --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1",
            ["--recompute-granularity"],
        ),
        (
            "--hf {mt} --gpus 8 --config {tmp}/hidden.yaml",
            ["--overlap-moe-expert-parallel-comm with --pipeline-model-parallel-size 2", "hidden.yaml, line 4"],
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
        (f"{MT} --search", ["--search", "--config"]),
        (f"{MT} --write {{tmp}}/nowhere/r.yaml", ["--write", "nowhere"]),
        ("--hf {tmp}/nowhere --gpus 8 --seq-length 4096 --global-batch-size 64", ["nowhere", "no such folder"]),
        ("--hf {tmp}/empty --gpus 8 --seq-length 4096 --global-batch-size 64", ["config.json"]),
        ("--hf {mt} --gpus 8 --config {tmp}/nowhere.yaml", ["nowhere.yaml"]),
        (
            "--hf {mt} --gpus 8 --config {tmp}/unknown_key.yaml",
            ["line 1", "tensor-model-parallel-sizes", "tensor-model-parallel-size"],
        ),
        (
            "--hf {hy3} --gpus 128 --seq-length 4096 --global-batch-size 512 --num-layers-per-virtual-pipeline-stage 4",
            ["--num-layers-per-virtual-pipeline-stage 4", "--pipeline-model-parallel-size", "give that as well"],
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


# ---- the search

PLAIN_SETTINGS = Settings()


def searched(config: HyConfig, layout: Layout, gpu: str = "H100", memory: float = 80, settings=PLAIN_SETTINGS, **asked):
    """All layouts without tensor and context parallelism, of micro-batches of one."""
    free = set(plan_command.CHOSEN) - {"context_parallel_size", "micro_batch_size", "tensor_model_parallel_size"}
    planner = Planner(config, Machine(layout.world_size, 8, Device(memory), HARDWARE[gpu]), **asked)
    return planner.search(layout, free, settings, set())


HY3 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1})
HY_MT2 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"] | {"max_position_embeddings": 262144})


def test_a_search_lists_legal_layouts_only_and_keeps_experts_in_a_node():
    found = searched(HY3, Layout(64, 4096, 256), "H200", 141)
    for plan in found.fitting:
        check(HY3, plan.layout, plan.settings)
        assert plan.layout.expert_model_parallel_size * plan.layout.expert_tensor_parallel_size <= 8
    assert len(found.fitting) == found.num_fitting > 20
    across = searched(HY3, Layout(64, 4096, 256), "H200", 141, experts_across_nodes=True)
    assert any(plan.layout.expert_model_parallel_size > 8 for plan in across.fitting)


def test_a_search_proposes_nothing_that_a_run_refuses_with_what_is_fixed():
    """--moe-shared-expert-overlap, whose experts cannot be recomputed; what counts on stages, where there are none; no
    precision-aware optimizer without the distributed one."""
    accounted = {f"account_for_{end}_in_pipeline_split": True for end in ("embedding", "loss")}
    fixed = Layout(64, 4096, 256, **accounted)
    settings = Settings(moe_shared_expert_overlap=True, use_distributed_optimizer=False, overlap_param_gather=False)
    found = searched(HY_MT2, fixed, "H200", 141, settings)
    for plan in [*found.fitting, *found.rejected]:
        check(HY_MT2, plan.layout, plan.settings)
        assert plan.layout.pp > 1 and not plan.settings.use_precision_aware_optimizer
        assert "shared_experts" not in plan.settings.recompute_modules
    assert len(found.fitting) > 1
    found = searched(HY_MT2, Layout(16, 4096, 256), "H200", 141, Settings(optimizer_cpu_offload=True))
    assert found.fitting and all(plan.settings.use_precision_aware_optimizer for plan in found.fitting)


@pytest.mark.parametrize("cores", [2, 3, 1000])
def test_on_several_cores_the_answer_is_the_same(monkeypatch, cores):
    """Order included, and what was rejected."""
    alone = searched(HY3, Layout(64, 4096, 256), "H200", 141)
    monkeypatch.setattr(search, "LAYOUTS_A_PROCESS", 20)
    monkeypatch.setattr(search.os, "sched_getaffinity", lambda pid: range(cores))
    shares = []
    run = search.workers.run
    monkeypatch.setattr(search.workers, "run", lambda work, dealt: shares.append(len(dealt)) or run(work, dealt))
    assert searched(HY3, Layout(64, 4096, 256), "H200", 141) == alone
    assert shares and set(shares) == {min(cores, alone.num_legal // 20)} and alone.num_legal // 20 > 3
    planner = Planner(HY3, Machine(64, 8, Device(141), HARDWARE["H200"]))
    layouts = [plan.layout for plan in alone.fitting]
    found = planner._on_all_cores(layouts, [PLAIN_SETTINGS], set())
    assert all(plan is None or plan.layout == layout for layout, (plan, _) in zip(layouts, found, strict=True))
    assert sum(plan is not None for plan, _ in found) > 20


def test_what_does_not_fit_is_listed_once_where_recomputation_is_fixed():
    free = set(plan_command.CHOSEN) - {"context_parallel_size", "micro_batch_size", "tensor_model_parallel_size"}
    planner = Planner(HY3, Machine(64, 8, Device(141), HARDWARE["H200"]))
    found = planner.search(Layout(64, 4096, 256), free, PLAIN_SETTINGS, {"recompute_granularity"})
    rejected = [(plan.layout, plan.settings) for plan in found.rejected]
    assert len(rejected) == len(set(rejected)) > 10
    assert {plan.settings.recompute_granularity for plan in [*found.fitting, *found.rejected]} == {None}


def test_the_host_s_memory_at_a_save_is_told_and_what_a_gpu_gathers_then():
    planner = Planner(HY_MT2, Machine(16, 8, Device(80), HARDWARE["H100"]))
    layout = Layout(16, 4096, 256, expert_model_parallel_size=8)
    lean, gathering = (
        planner.plan(layout, Settings(distrib_optim_fully_reshardable_mem_efficient=is_lean))
        for is_lean in (True, False)
    )
    host = planner.host(lean)
    [line] = report.host_lines(lean, planner)
    assert "(fully reshardable, memory-efficient checkpoints)" in line
    assert f"at a save {host.save / 2**30:.0f}, at a load {host.load / 2**30:.0f}, offloaded 0." in line
    line, more = report.host_lines(gathering, planner)
    assert "(fully reshardable checkpoints)" in line and planner.host(gathering).gpu_at_save > 2**30
    assert f"a save gathers up to {planner.host(gathering).gpu_at_save / 2**30:.1f} GiB" in more


def test_a_search_under_a_hidden_all_to_all_lists_what_megatron_takes():
    """Virtual stages, experts to exchange, and neither full recomputation nor that of whole MoE layers."""
    hidden = Settings(overlap_moe_expert_parallel_comm=True)
    plain, found = (searched(HY_MT2, Layout(32, 4096, 256), settings=settings) for settings in (Settings(), hidden))
    assert 0 < found.num_legal < plain.num_legal
    for plan in [*found.fitting, *found.rejected]:
        check(HY_MT2, plan.layout, plan.settings)
    for plan in found.fitting:
        assert plan.layout.pipeline_model_parallel_size == 1 or "x" in describe(plan)
        assert plan.layout.expert_model_parallel_size > 1 and "full" not in describe(plan)


def test_the_search_takes_the_cheapest_that_fits_of_each_layout():
    """Against all combinations of optimizer, recomputation and logits, tried one by one and timed: for each layout none
    that fits is more than 2 % faster.
    """
    layout = Layout(16, 4096, 64)
    planner = Planner(HY_MT2, Machine(16, 8, Device(80), HARDWARE["H100"]), margin=4 * GIB)
    recomputations = [
        {},
        *(
            {"recompute_granularity": "selective", "recompute_modules": modules}
            for modules in (
                ("moe_act",),
                ("moe_act", "layernorm"),
                ("moe_act", "layernorm", "shared_experts"),
                ("moe",),
            )
        ),
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ]
    by_layout = {plan.layout: plan for plan in searched(HY_MT2, layout, margin=4 * GIB).fitting}
    assert any(plan.settings.hy_recompute_logits for plan in by_layout.values())
    assert any(plan.settings.use_precision_aware_optimizer for plan in by_layout.values())
    for one, chosen in by_layout.items():
        for recomputed in recomputations:
            for aware in (False, True):
                for logits in (False, True):
                    other = planner.plan(
                        one, Settings(use_precision_aware_optimizer=aware, hy_recompute_logits=logits, **recomputed)
                    )
                    assert not planner.fits(other) or chosen.time.total < 1.02 * other.time.total, describe(other)


def test_a_precision_aware_optimizer_comes_before_recomputation():
    """It costs no time. Hy-MT2 on 8 GPUs of 80 GiB, four of tensor parallelism: with it nothing is recomputed."""
    layout = Layout(8, 8192, 64, tensor_model_parallel_size=4, expert_model_parallel_size=8)
    planner = Planner(HY_MT2, Machine(8, 8, Device(80), HARDWARE["H100"]))
    (plan,) = planner.search(layout, set(), Settings(), set()).fitting
    assert plan.settings.recompute_granularity is None and plan.settings.use_precision_aware_optimizer
    assert not planner.fits(planner.plan(layout, Settings()))


def test_the_last_recomputation_is_the_smallest():
    """What the search goes by: where it does not fit, none does."""
    planner = Planner(HY_MT2, Machine(16, 8, Device(80), HARDWARE["H100"]))
    layouts = {plan.layout for plan in searched(HY_MT2, Layout(16, 4096, 64)).fitting}
    assert len(layouts) > 50
    for layout in layouts:
        peaks = [
            max(stage.total for stage in memory_by_stage(HY_MT2, layout, settings, 1.2))
            for settings in planner._recomputations(layout, Settings(), set())
        ]
        assert peaks[-1] == min(peaks), layout


def test_numerics_change_only_where_nothing_else_fits():
    """Hy-MT2 on 8 GPUs: on 80 GiB fp32 state fits, on 56 it does not, on 40 only the host's memory is left."""
    expected = {80: (True, False), 56: (False, False), 40: (True, True)}
    for memory, (grads_in_fp32, offload) in expected.items():
        for plan in searched(HY_MT2, Layout(8, 4096, 64), memory=memory).fitting:
            assert (plan.settings.grads_in_fp32, plan.settings.optimizer_cpu_offload) == (grads_in_fp32, offload), (
                memory
            )


def test_a_margin_stays_free():
    free, kept = (searched(HY_MT2, Layout(16, 4096, 64), margin=margin) for margin in (0, 8 * GIB))
    least = [Device(80).usable - max(plan.peak for plan in found.fitting) for found in (free, kept)]
    assert least[0] < 8 * GIB <= least[1]


def test_every_gpu_has_a_peak_and_a_memory_alone_means_the_first_that_has_it():
    assert HARDWARE.keys() <= PEAK_TFLOPS.keys() and {"GB200", "B300", "GB300"} <= HARDWARE.keys()
    assert hardware_of(None, None).name == hardware_of(None, 80).name == "H100"
    assert hardware_of(None, 141).name == "H200" and hardware_of("a100", 40).name == "A100"
    for name, hardware in HARDWARE.items():
        assert hardware.name == name and hardware.peak_tflops == PEAK_TFLOPS[name]
