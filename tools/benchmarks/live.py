"""What a model in training costs to give its weights away: memory of a rank above the model, and time.

A bf16 model of random weights over two processes (expert parallelism 2 by default), on CPU. Memory is the resident
set's peak while it goes on, over what was resident before; the worst rank's.

    python tools/benchmarks/live.py [--layers 13] [--layout "--tensor-model-parallel-size 2"] [--repeats 3]
"""

import argparse
import contextlib
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZES = {
    "vocab_size": 60_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "expert_hidden_dim": 768,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--layout", default="--expert-model-parallel-size 2", help="flags of pretrain_hy.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    """Start the ranks, each of which runs `measure`."""
    from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
    from hymeg.hf.config import HyConfig

    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = HyConfig.from_dict(TINY_CONFIG | SIZES | {"num_hidden_layers": given.layers, "dtype": "bfloat16"})
        config.save(Path(folder))
        own = [__file__, "--layers", str(given.layers), "--layout", given.layout, "--repeats", str(given.repeats)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *own, "--folder", folder]
        root = str(Path(__file__).parents[2])
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root})


def measure(given: argparse.Namespace) -> None:
    from hymeg import platform

    platform.install()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import validate_args

    from hymeg.checkpoint.live import export_weights, load_weights
    from hymeg.checkpoint.live_folder import save_hf_folder
    from hymeg.models.hy import construct
    from hymeg.training.arguments import parse
    from hymeg.training.run import model_config_from_args

    fixed = (
        f"--hf-model {given.folder} --seq-length 64 --train-iters 1 --lr 1e-3 --bf16 --init-from-scratch --mock-data"
    )
    dist.init_process_group("gloo")
    args, config = parse([*fixed.split(), *shlex.split(given.layout)])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(args)
    sizes = [getattr(args, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model")]
    parallel_state.initialize_model_parallel(
        *sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = [construct(model_config_from_args(args), ProcessGroupCollection.use_mpu_process_groups()).bfloat16()]
    held = torch.tensor(sum(p.nbytes for p in model[0].parameters()) / 1e9)
    dist.all_reduce(held)
    out = Path(given.folder) / "out"

    def export(**how) -> None:
        for _ in export_weights(model, config, **how):
            pass

    ways = {
        "export_weights, hub, to all": export,
        "export_weights, fused, to all": lambda: export(layout="fused"),
        "export_weights, hub, to rank 0": lambda: export(to_rank=0),
        "save_hf_folder": lambda: save_hf_folder(model, config, out, overwrite=True),
        "load_weights": lambda: load_weights(model, config, out),
    }
    rows = {name: [measured(way) for _ in range(given.repeats)] for name, way in ways.items()}
    largest = max(tensor.nbytes for _, tensor in export_weights(model, config)) / 1e6
    if dist.get_rank() == 0:
        print(f"{held.item():.2f} GB held by two ranks ({given.layout}), the largest tensor {largest:.0f} MB")
        print("| | MB above the model, worst rank | s, median |\n|---|---|---|")
        for name, found in rows.items():
            memory, seconds = zip(*found, strict=True)
            print(f"| {name} | {max(memory):.0f} | {statistics.median(seconds):.1f} |")
    dist.destroy_process_group()


def measured(way: Callable[[], None]) -> tuple[float, float]:
    """MB above what was resident before, the worst rank's, and seconds."""
    import torch
    import torch.distributed as dist

    from hymeg.checkpoint.workers import memory_of_process

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_of_process("status", "VmRSS")
    dist.barrier()
    start = time.perf_counter()
    way()
    dist.barrier()
    seconds = time.perf_counter() - start
    peak = torch.tensor((memory_of_process("status", "VmHWM") - before) / 1e6)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item(), seconds


if __name__ == "__main__":
    given = arguments()
    measure(given) if "RANK" in os.environ else main(given)
