"""The planner's own time and memory, and its estimates beside what others published.

    python tools/benchmarks/plan.py

The published runs are named in docs/planning.md; what they did not say of batch and layout is assumed there.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.hf.config import HyConfig
from hymeg.planning.layout import Layout
from hymeg.planning.memory import GIB, Device, memory_by_stage
from hymeg.planning.network import HARDWARE, Machine
from hymeg.planning.settings import Settings
from hymeg.planning.step_time import StepModel

ROOT = Path(__file__).parents[2]
HY3 = dict(
    hidden_size=4096,
    intermediate_size=13312,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    num_experts=192,
) | dict(
    moe_intermediate_size=1536,
    expert_hidden_dim=1536,
    head_dim=128,
    vocab_size=120832,
    num_experts_per_tok=8,
    num_nextn_predict_layers=1,
)
QWEN3_30B = dict(
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_experts=128,
    moe_intermediate_size=768,
) | dict(
    expert_hidden_dim=768,
    head_dim=128,
    vocab_size=151936,
    num_experts_per_tok=8,
    first_k_dense_replace=0,
    enable_lm_head_fp32=False,
)
QWEN3_235B = QWEN3_30B | dict(
    hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536, expert_hidden_dim=1536
)
SPLIT_94 = "E" + "t*3|" * 30 + "t*2|t*2L"
PUBLISHED = [  # name, model, layout, settings, tokens/s/GPU
    ("Qwen3-30B-A3B, 8 H100, bf16", QWEN3_30B, Layout(8, 4096, 512, expert_model_parallel_size=8), Settings(), 12040),
    ("Qwen3-30B-A3B, 16 H100, FP8", QWEN3_30B, Layout(16, 4096, 1024, expert_model_parallel_size=16), Settings(), 8826),
    (
        "Qwen3-235B-A22B, 256 H100, FP8",
        QWEN3_235B,
        Layout(256, 4096, 2048, 1, 2, 8, pipeline_model_parallel_layout=SPLIT_94, expert_model_parallel_size=32),
        Settings(overlap_moe_expert_parallel_comm=True, use_precision_aware_optimizer=True),
        1712,
    ),
]
MACHINE = Machine(256, 8, Device(80), HARDWARE["H100"])


def compare() -> None:
    print("| run | tokens/s/GPU published | estimated | off by | GiB of the fullest GPU |\n|---|---|---|---|---|")
    for name, shape, layout, settings, published in PUBLISHED:
        config = dataclasses.replace(HyConfig.from_dict(TINY_CONFIG | shape), num_shared_experts=0)
        found = StepModel(config, layout, settings, MACHINE, imbalance=1.0).step().tokens_per_gpu
        fullest = max(stage.total for stage in memory_by_stage(config, layout, settings, 1.0)) / GIB
        print(f"| {name} | {published:,} | {found:,.0f} | {found / published - 1:+.0%} | {fullest:.1f} |")


def timed(folder: str, name: str, flags: str) -> None:
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "tools/plan.py"), "--hf", folder, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise SystemExit(f"plan.py failed:\n{done.stderr[-2000:]}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"| {name} | {time.perf_counter() - start:.1f} | {peak:.2f} |", flush=True)


def main() -> None:
    compare()
    print("\n| what | seconds | GiB, the most so far |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TINY_CONFIG | HY3 | {"max_position_embeddings": 262144}))
        flags = "--seq-length 4096 --global-batch-size 4096 --gpus 1024"
        fixed = (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 16 --expert-model-parallel-size 8 "
            "--expert-tensor-parallel-size 1 --micro-batch-size 1 --context-parallel-size 1 "
            "--num-virtual-stages-per-pipeline-rank 1"
        )
        timed(folder, "a fixed layout of Hy3 on 1024 GPUs, explained", f"{flags} {fixed} --explain")
        timed(folder, "a full search for Hy3 on 1024 GPUs", flags)


if __name__ == "__main__":
    main()
