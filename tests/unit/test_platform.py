"""The CPU platform: what it replaces is there to be replaced, and what it puts in its place computes the same."""

import contextlib
import gc
import importlib.metadata
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hymeg import platform
from hymeg.errors import UserError
from hymeg.platform import device
from hymeg.platform.adam import FusedAdam
from hymeg.platform.patches import INSTALLED, patch, patched

DOOR = Path(__file__).parents[2] / "pretrain_hy.py"

requires_cpu = pytest.mark.skipif(not platform.is_cpu(), reason="the patches are installed on CPU only")


def test_what_an_evaluation_learns_is_kept_and_of_the_test_data_forgotten(monkeypatch):
    """A rank that reads no text learns in it how long validation data are; test data are another set."""
    from hymeg.platform import megatron

    args = SimpleNamespace(
        eval_iters=[None], test_iters=7, full_validation=True, multiple_validation_sets=True, validation_set_names=None
    )
    monkeypatch.setattr(megatron, "get_args", lambda: args)
    seen = []

    def evaluate_and_print(title):
        seen.append(args.eval_iters)
        args.eval_iters = [51]

    megatron._test_data_apart(evaluate_and_print, "iteration 2")
    megatron._test_data_apart(evaluate_and_print, "iteration 2 on test set")
    assert (seen, args.eval_iters, args.full_validation) == ([[None], 7], [51], True)


@requires_cpu
def test_every_patch_target_exists_in_the_pinned_megatron():
    """Installing raises when a target is gone; here all are, each once and with its reason."""
    assert importlib.metadata.version("megatron-core") == "0.19.2"
    targets = [(id(p.owner), p.name) for p in INSTALLED]
    assert len(targets) == len(set(targets)) > 40
    for p in INSTALLED:
        assert p.reason and getattr(p.owner, p.name) is not p.original, p


def test_a_target_that_is_gone_is_an_error():
    with pytest.raises(RuntimeError, match=r"patch target gone: json\.no_such_name \(line 7\)"):
        patch(__import__("json"), "no_such_name", None, "line 7")


def test_a_temporary_patch_is_undone():
    import json

    before, count = json.dumps, len(INSTALLED)
    with patched(json, "dumps", None, "test"):
        assert json.dumps is None
    assert json.dumps is before and len(INSTALLED) == count


@requires_cpu
def test_platform_must_come_before_megatron(monkeypatch):
    """Here Megatron has been imported already."""
    monkeypatch.setattr(platform, "_installed", False)
    with pytest.raises(RuntimeError, match="must run before anything imports megatron"):
        platform.install()


def test_kernels_for_cuda_that_are_installed_are_not_used_on_the_cpu(tmp_path):
    """On the login node of a cluster, in NVIDIA's containers."""
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported where there is no CUDA')")
    code = """from hymeg import platform; platform.install()
from megatron.core.transformer import transformer_block as block; print(block.HAVE_TE, block.HAVE_APEX)"""
    path = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    environment = os.environ | {"HYMEG_PLATFORM": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_tools_are_not_drowned_in_warnings():
    """Nor kept waiting for a compiler that will compile nothing."""
    code = """from hymeg import platform; platform.install(); import hymeg.training.preflight
import sys, torch
if platform.is_cpu():
    from hymeg.platform.adam import FusedAdam
    adam = FusedAdam([torch.nn.Parameter(torch.ones(1))])
    adam.load_state_dict(adam.state_dict())
    assert "torch._dynamo" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_garbage_is_collected_again_once_all_is_imported(monkeypatch):
    from hymeg.training import run

    seen = []
    monkeypatch.setattr(run, "main", lambda argv: seen.append((argv, gc.isenabled(), gc.get_freeze_count() > 0)))
    monkeypatch.setattr(sys, "argv", ["pretrain_hy.py", "--help"])
    gc.unfreeze()
    runpy.run_path(str(DOOR), run_name="__main__")
    assert seen == [(["--help"], True, True)]


def test_platform_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setattr(platform, "_name", None)
    monkeypatch.setenv("HYMEG_PLATFORM", "tpu")
    with pytest.raises(UserError, match="HYMEG_PLATFORM is 'tpu'; allowed are 'cpu' and 'cuda'"):
        platform.name()
    if not torch.cuda.is_available():
        monkeypatch.setenv("HYMEG_PLATFORM", "cuda")
        with pytest.raises(UserError, match="HYMEG_PLATFORM=cuda, but torch sees no CUDA device"):
            platform.name()


def doubling(in_backward):
    """A function that doubles; what its backward pass is given goes through `in_backward` first."""

    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor * 2

        @staticmethod
        def backward(context, gradient):
            return in_backward(gradient) * 2

    return Doubling


def asked_for() -> torch.device:
    return torch.ones(2, device=torch.cuda.current_device()).device


@requires_cpu
class TestTorchCuda:
    def test_tensors_asked_for_on_cuda_are_on_the_cpu(self):
        for tensor in (
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.cuda.current_device(), pin_memory=True),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.ones(2).to("cuda:0"),
            torch.ones(2).to(device=0),
            torch.ones(2).new_zeros(3, device="cuda"),
            torch.ones(2).cuda(),
            torch.nn.Linear(2, 2).to("cuda").weight,
        ):
            assert tensor.device.type == "cpu"

    def test_so_are_those_that_a_backward_pass_asks_for(self):
        """Torch leaves a mode for the time of a backward pass, within a recomputed layer's too."""
        devices = []
        double = doubling(lambda gradient: devices.append(asked_for().type) or gradient.cuda())
        parameter = torch.ones(2, requires_grad=True)
        double.apply(parameter).sum().backward()
        torch.utils.checkpoint.checkpoint(double.apply, parameter, use_reentrant=True).sum().backward()
        torch.autograd.grad(double.apply(parameter).sum(), parameter)
        assert parameter.grad.tolist() == [4, 4] and devices == ["cpu"] * 3

    def test_a_backward_pass_can_go_unwatched(self):
        """What it asks for by `current_device()` is made on the CPU all the same."""
        seen = []
        disabled = torch._C._is_torch_function_all_disabled
        double = doubling(lambda gradient: seen.append((disabled(), asked_for().type)) or gradient)
        for context in (device.unwatched_backward, contextlib.nullcontext):
            with context():
                double.apply(torch.ones(2, requires_grad=True)).sum().backward()
        assert seen == [(True, "cpu"), (False, "cpu")] and torch.cuda.current_device() == 0
        with device.unwatched(), device.watched():
            assert torch.ones(2, device="cuda").device.type == "cpu"

    def test_other_devices_and_dtypes_pass(self):
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.ones(2).to(torch.int32).dtype == torch.int32
        with torch.device("meta"):
            assert torch.zeros(2).device.type == "meta"

    def test_tensor_types_read_as_on_a_gpu(self):
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2, device="meta").type() != "torch.cuda.FloatTensor"
        assert torch.ones(2).type(torch.int32).dtype == torch.int32

    def test_the_devices_generator_is_torchs(self):
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), first)

    def test_nothing_is_compiled(self):
        def function():
            pass

        assert torch.compile(function) is function
        assert torch.compile(mode="max-autotune", dynamic=False)(function) is function

    def test_memory_is_the_processs(self):
        before = torch.cuda.memory_allocated()
        held = torch.ones(2**24)
        assert torch.cuda.memory_allocated() - before > 2**25
        assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() - 2**22
        del held


@requires_cpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_the_gradient_of_swiglu_is_autograds(weighted, dtype, tolerance):
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    random = torch.Generator().manual_seed(0)
    of_output = torch.randn(20, 6, generator=random).to(dtype)
    given = torch.randn(20, 12, generator=random).to(dtype), torch.rand(20, 1, generator=random)
    y, weights = (one.clone().requires_grad_() for one in given)
    exact_y, exact_weights = (one.double().requires_grad_() for one in given)
    output = weighted_bias_swiglu_impl(y, None, weights) if weighted else bias_swiglu_impl(y, None)
    output.backward(of_output)
    gate, up = exact_y.chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up * (exact_weights if weighted else 1)
    exact.backward(of_output.double())
    for found, expected in ((y.grad, exact_y.grad), (weights.grad, exact_weights.grad))[: 1 + weighted]:
        assert (found - expected).norm() <= max(tolerance, 1e-6 * (found is weights.grad)) * expected.norm()
        assert found.dtype == (dtype if found is y.grad else torch.float32)


@requires_cpu
def test_chunks_that_are_in_order_are_not_copied():
    from megatron.core.transformer.moe.token_dispatcher import sort_chunks_by_idxs

    tokens, probs, sizes = torch.arange(12.0).view(6, 2), torch.arange(6.0), torch.tensor([1, 2, 3])
    assert sort_chunks_by_idxs(tokens, sizes, torch.arange(3), probs) == (tokens, probs)
    found, of_probs = sort_chunks_by_idxs(tokens, sizes, torch.tensor([2, 0, 1]), probs)
    assert of_probs.tolist() == [3, 4, 5, 0, 1, 2] and torch.equal(found, tokens[of_probs.long()])


@requires_cpu
def test_the_peak_of_every_stage_is_told_on_a_gpu(monkeypatch):
    from single_process import ensure_world

    ensure_world()
    assert device.peak_bytes_by_stage() is None
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_345_678_901)
    assert device.peak_bytes_by_stage() == [12_345_678_901]


class TestFusedAdam:
    @pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
    def test_equals_torchs_optimizer(self, adam_w_mode, reference):
        settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        ours, theirs = (
            [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)), torch.nn.Parameter(torch.ones(5))]
            for _ in range(2)
        )
        optimizers = (
            FusedAdam([{"params": ours}], adam_w_mode=adam_w_mode, **settings),
            reference([{"params": theirs}], **settings),
        )
        for step in range(5):
            for params, optimizer in zip((ours, theirs), optimizers, strict=True):
                for number, parameter in enumerate(params):
                    parameter.grad = torch.sin(torch.arange(parameter.numel()).float() * (step + 1) + number).view_as(
                        parameter
                    )
                optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)

    def test_state_lies_where_transformer_engines_does(self):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = FusedAdam([{"params": [parameter]}, {"params": []}])
        for _ in range(2):
            parameter.grad = torch.ones(3)
            optimizer.step()
        assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}
        assert [group.get("step") for group in optimizer.param_groups] == [2, None]

    def test_what_only_the_gpu_offers_is_refused(self):
        with pytest.raises(ValueError, match="master_weights"):
            FusedAdam([torch.nn.Parameter(torch.ones(1))], master_weights=True)


def test_nothing_else_asks_for_a_device():
    """Outside hymeg.platform no code names CUDA, moves a tensor or asks which platform it is; the layer specs ask
    Megatron's configuration.
    """
    import ast
    from pathlib import Path

    import hymeg

    root = Path(hymeg.__file__).parent
    sources = [path for path in root.rglob("*.py") if root / "platform" not in path.parents]
    assert len(sources) > 25
    found = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (
                node.attr in ("is_cuda", "is_cpu", "pin_memory")
                or (node.attr == "cuda")
                or (isinstance(node.value, ast.Name) and node.attr == "mps")
            ):
                found.append(f"{path.relative_to(root)}:{node.lineno}: .{node.attr}")
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and (node.value == "cuda" or node.value.startswith("cuda:"))
            ):
                found.append(f"{path.relative_to(root)}:{node.lineno}: {node.value!r}")
    assert not found
