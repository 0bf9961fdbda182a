"""What the log line says, and to whom."""

import contextlib
import importlib.metadata
import math
import socket
import types

import numpy as np
import pytest
import torch
from single_process import ensure_world

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.hf.config import HyConfig
from hymeg.models.router import Router
from hymeg.planning.flops import packed_training_flops
from hymeg.planning.layout import Layout
from hymeg.planning.memory import Device
from hymeg.planning.network import HARDWARE, Machine
from hymeg.planning.settings import Settings
from hymeg.planning.step_time import StepModel
from hymeg.reporting.record import RunRecord
from hymeg.training import metrics, run_record

CONFIG = HyConfig.from_dict(TINY_CONFIG)


class Counted(Router):
    """What has been counted in a layer, and nothing else of a router."""

    def __init__(self, layer: int, counts: list[int]):
        torch.nn.Module.__init__(self)
        self.layer_number, self.is_mtp_layer, self.expert_load = layer, False, torch.tensor(counts)


def arguments(world_size: int, log_interval: int, **changes) -> types.SimpleNamespace:
    given = {"seq_length": 64, "rank": 0, "save": None, "expert_model_parallel_size": 1, "lora_rank": None} | changes
    return types.SimpleNamespace(world_size=world_size, log_interval=log_interval, **given)


def test_expert_load_is_busiest_over_mean_and_starts_again():
    ensure_world()
    chunk = torch.nn.ModuleList([Counted(2, [4, 0, 0, 0, 0, 0, 0, 4]), Counted(3, [1, 1, 1, 1, 2, 2, 0, 0])])
    counts = metrics.expert_counts([chunk], CONFIG)
    assert metrics.busiest_over_mean(counts, 8) == {1: 4.0, 2: 2.0}
    assert metrics.busiest_over_mean(counts, 4) == {1: 2.0, 2: 2.0}
    assert metrics.busiest_over_mean(counts, 2) == metrics.busiest_over_mean(counts, 1) == {1: 1.0, 2: 1.0}
    assert metrics.busiest_over_mean(metrics.expert_counts([chunk], CONFIG), 4) == {}


def test_tensorboard_and_weights_and_biases_get_what_the_line_says(monkeypatch):
    ensure_world()
    written, logged = {}, {}
    tensorboard = types.SimpleNamespace(add_scalar=lambda name, value, iteration: written.update({name: value}))
    wandb = types.SimpleNamespace(
        log=lambda values, iteration: logged.update(values), Image=lambda pixels, caption: pixels
    )
    monkeypatch.setattr(run_record, "get_tensorboard_writer", lambda: tensorboard)
    monkeypatch.setattr(run_record, "get_wandb_writer", lambda: wandb)
    monkeypatch.setattr(metrics, "get_current_global_batch_size", lambda: 4)
    args = arguments(2, 1, expert_model_parallel_size=4)
    means = iter([{"0-a": 1.5, "1-b": 2.0}])
    by_set = types.SimpleNamespace(means=lambda forget: next(means) if forget else None)
    line = metrics.LogLine(args, CONFIG, "NVIDIA H100 80GB HBM3", RunRecord(None, {}, print), print, by_set)
    assert line.watch([Counted(2, [4, 0, 0, 0, 0, 0, 0, 4])]) == line.model_chunks
    line.before(1, False, 192.0, 12288.0)
    line.seconds = 0.5
    text = line.extended("| throughput per GPU (TFLOP/s/GPU): 0.0 | loss: 1 |")
    tflops = packed_training_flops(CONFIG, 192, 12288) / 0.5 / 2 / 1e12
    assert f"(TFLOP/s/GPU): {tflops:.4g} |" in text and "tokens/s: 384 |" in text and "full: 75.0% |" in text
    assert "expert load max/mean: 4.00 (by layer 1:4.00) | by expert-parallel rank: 2.00 |" in text
    assert text.endswith(" loss by data set: 0-a 1.500000E+00 1-b 2.000000E+00 |")
    assert (written["lm loss/0-a"], written["lm loss/1-b"]) == (1.5, 2.0)
    squares = logged.pop("expert-load/heat-map")
    assert (squares[3, ::6].tolist(), squares.shape) == ([255, 0, 0, 0, 0, 0, 0, 255], (6, 48))
    assert written == logged and written["tokens-per-second"] == 384 and written["full"] == 0.75
    assert (
        math.isclose(written["model-tflops-per-gpu"], tflops)
        and written["expert-load/layer-1"] == 4
        and written["expert-parallel-load"] == 2
    )
    assert written["mfu"] == pytest.approx(tflops / 989)


def test_a_run_s_record_begins_with_where_and_how_it_runs():
    sizes = (
        "tensor_model_parallel pipeline_model_parallel context_parallel expert_model_parallel expert_tensor_parallel"
    )
    names = [f"{name}_size" for name in f"{sizes} virtual_pipeline_model_parallel data_parallel micro_batch".split()]
    layout = {name: number for number, name in enumerate([*names, "seq_length", "global_batch_size"])}
    args = types.SimpleNamespace(**layout, world_size=64, train_iters=5, hf_model="a/folder")
    found = run_record.facts(args, CONFIG, {"digest": "d"})
    assert found["layout"] == layout and (found["world_size"], found["train_iters"]) == (64, 5)
    assert found["host"] == socket.gethostname() and found["data"] == {"digest": "d"}
    assert found["model"] == {"folder": "a/folder"} | {
        name: TINY_CONFIG[name]
        for name in ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "vocab_size")
    } | {"num_nextn_predict_layers": 0}
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["expert_counts"] == [CONFIG.num_hidden_layers, CONFIG.num_experts]


def test_a_step_counts_full_samples_where_no_lengths_are_known(monkeypatch):
    given = []
    monkeypatch.setattr(metrics.megatron, "flops_formula", lambda flops: contextlib.nullcontext(given.append(flops)))
    monkeypatch.setattr(metrics.megatron, "log_line", contextlib.nullcontext)
    monkeypatch.setattr(metrics, "training_sets", lambda args: [])
    model = types.SimpleNamespace(post_wrap_hooks=None)
    with metrics.logging(arguments(1, 1), CONFIG, model, None, print) as set_losses:
        assert set_losses is None and len(model.post_wrap_hooks) == 1
    [flops] = given
    assert flops(4, None, None) == packed_training_flops(CONFIG, 4 * 64, 4 * 64**2)
    assert flops(4, 5000.0, 200.0) == packed_training_flops(CONFIG, 200.0, 5000.0)


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_the_line_counts_as_the_planner_does(monkeypatch, lora_rank):
    """Beside adapters the frozen weights' products are two, not three."""
    planned = StepModel(
        CONFIG, Layout(1, 64, 4), Settings(lora_rank=lora_rank), Machine(1, 8, Device(80), HARDWARE["H100"]), 1.0
    ).step()
    given = []
    monkeypatch.setattr(metrics.megatron, "flops_formula", lambda flops: contextlib.nullcontext(given.append(flops)))
    monkeypatch.setattr(metrics.megatron, "log_line", lambda line: contextlib.nullcontext(given.append(line)))
    monkeypatch.setattr(metrics, "training_sets", lambda args: [])
    monkeypatch.setattr(metrics, "get_current_global_batch_size", lambda: 4)
    args, model = arguments(1, 1, lora_rank=lora_rank), types.SimpleNamespace(post_wrap_hooks=None)
    with metrics.logging(args, CONFIG, model, RunRecord(None, {}, print), print):
        flops, line = given
    assert flops(4, None, None) / planned.total / 1e12 == pytest.approx(planned.tflops_per_gpu)
    line.seconds = planned.total
    said = line.extended("| throughput per GPU (TFLOP/s/GPU): 0.0 |")
    assert float(said.split("GPU): ")[1].split()[0]) == pytest.approx(planned.tflops_per_gpu, rel=1e-3)


def test_every_line_is_of_its_own_iterations(monkeypatch):
    monkeypatch.setattr(metrics, "get_current_global_batch_size", lambda: 4)
    args = arguments(1, 2)
    ensure_world()
    line = metrics.LogLine(args, CONFIG, "", RunRecord(None, {}, print), print)
    line.watch([])
    line.seconds = 1.0
    for iteration, tokens in ((1, 256.0), (2, 128.0), (3, 64.0), (4, 32.0)):
        line.before(iteration, False, tokens, tokens**2)
        if iteration % 2 == 0:
            mean = {2: 192, 4: 48}[iteration]
            assert f" tokens/s: {mean} | full: {mean / 256:.1%} |" in line.extended("")


def test_the_heat_map_is_drawn_at_every_tenth_line_with_the_mean_a_third_of_white(monkeypatch):
    pictures = {}
    wandb = types.SimpleNamespace(
        log=lambda values, iteration: pictures.setdefault(iteration, values.get("expert-load/heat-map")),
        Image=lambda pixels, caption: pixels,
    )
    monkeypatch.setattr(run_record, "get_wandb_writer", lambda: wandb)
    run_record.write_heat_map(np.array([[0, 0, 0, 0], [2, 2, 2, 2], [0, 1, 3, 0]]), 7)
    assert pictures[7][::6, ::6].tolist() == [[85, 85, 85, 85], [0, 85, 255, 0]]  # of the layers that have experts
    drawn = []
    monkeypatch.setattr(metrics, "write_heat_map", lambda counts, iteration: drawn.append(iteration))
    monkeypatch.setattr(metrics, "get_current_global_batch_size", lambda: 4)
    args = arguments(1, 1)
    ensure_world()
    line = metrics.LogLine(args, CONFIG, "", RunRecord(None, {}, print), print)
    line.seconds = 1.0
    for iteration in range(1, 22):
        line.watch([Counted(2, [4, 0, 0, 0, 0, 0, 0, 4])])
        line.before(iteration, False)
        line.extended("")
    assert drawn == [1, 11, 21]


@pytest.mark.parametrize(("iteration", "is_skipped"), [(4, False), (5, False), (4, True)])
def test_the_line_is_told_what_megatrons_log_is_told(monkeypatch, iteration, is_skipped):
    """By place: `training_log(loss_dict, total_loss_dict, learning_rate, iteration, ..., grad_norm, ...)`."""
    from megatron.training import training

    from hymeg.platform import megatron as platform_megatron

    told, logged = [], []
    line = types.SimpleNamespace(
        check=lambda *given: told.append(("check", *given)),
        before=lambda *given: told.append(("before", *given)),
        extended=lambda message: f"{message} and more",
    )

    def training_log(*args, is_first_iteration, **kwargs):
        logged.append(is_first_iteration)
        assert timer.elapsed() == 6.0
        training.print_rank_last("the line")

    timer = types.SimpleNamespace(elapsed=lambda: 6.0)
    monkeypatch.setattr(platform_megatron, "get_timers", lambda: lambda name: timer)
    monkeypatch.setattr(platform_megatron, "get_args", lambda: types.SimpleNamespace(log_interval=4))
    monkeypatch.setattr(training, "training_log", training_log)
    monkeypatch.setattr(training, "print_rank_last", told.append)
    total = {"advanced iterations": 2, "skipped iterations": 1, "lm loss": 7.0}
    of_call = ["losses", total, "rate", iteration, 4, 5, is_skipped, "norm", 8, 9]
    packed = {"total_real_tokens_in_batch": 30, "seqlen_squared_sum_in_batch": 400}
    with platform_megatron.log_line(line):
        training.training_log(*of_call, is_first_iteration=True, **packed)
    checked = [] if is_skipped else [("check", iteration, "losses")]
    assert told == [*checked, ("before", iteration, iteration != 4, 30, 400), "the line and more"]
    assert (line.learning_rate, line.grad_norm, line.seconds, line.losses) == ("rate", "norm", 2.0, {"lm loss": 3.5})
    assert logged == [iteration != 4] and training.training_log is training_log
