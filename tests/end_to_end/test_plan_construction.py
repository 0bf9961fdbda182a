"""The planner's arithmetic against Megatron's own construction, on the meta device: parameters, DDP buffers, optimizer
shards.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from published_models import PUBLISHED

from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG
from hymeg.hf.config import HyConfig

ROOT = Path(__file__).parents[2]
HY3 = HyConfig.from_dict(
    TINY_CONFIG | PUBLISHED["Hy3"] | {"num_nextn_predict_layers": 1, "max_position_embeddings": 262144}
)
HY_MT2 = HyConfig.from_dict(TINY_CONFIG | PUBLISHED["Hy-MT2-30B-A3B"] | {"max_position_embeddings": 262144})
MODELS = {
    "hy3": HY3,
    "hy_mt2": HY_MT2,
    "tiny": HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1000, "head_dim": 10, "num_nextn_predict_layers": 1}),
}

DISTRIBUTED = "--use-distributed-optimizer"
BUILDS = [  # model, GPUs, flags, pipeline ranks
    ("hy3", 256, f"--pp 8 --vpp 2 --ep 8 {DISTRIBUTED} --overlap-grad-reduce", [0, 7]),
    (
        "hy3",
        128,
        f"--tp 2 --etp 1 --pp 8 --ep 8 {DISTRIBUTED} --pipeline-model-parallel-layout E|(t*12|)*6t*8mL",
        [1, 7],
    ),
    ("hy3", 1024, f"--tp 4 --etp 1 --pp 16 --ep 32 {DISTRIBUTED} --overlap-grad-reduce", [0, 15]),
    ("hy3", 64, f"--tp 8 --etp 8 --pp 4 --cp 2 --ep 1 --decoder-first-pipeline-num-layers 20 {DISTRIBUTED}", [0]),
    ("hy3", 96, "--tp 2 --pp 2 --ep 24", [1]),
    ("hy_mt2", 8, f"--ep 8 {DISTRIBUTED} --overlap-grad-reduce", [0]),
    ("hy_mt2", 16, f"--tp 2 --etp 1 --pp 4 --vpp 3 --ep 4 {DISTRIBUTED} --grad-reduce-in-bf16", [0, 3]),
    ("hy_mt2", 64, f"--cp 8 --ep 8 {DISTRIBUTED} --overlap-grad-reduce --ddp-bucket-size 10000000", [0]),
    ("hy_mt2", 64, f"--tp 8 --etp 1 --ep 64 {DISTRIBUTED} --ddp-pad-buckets-for-high-nccl-busbw", [0]),
    ("hy_mt2", 12, "--pp 3 --ep 4", [2]),
    ("tiny", 6, f"--pp 2 --cp 3 --seq-length 96 {DISTRIBUTED} --overlap-grad-reduce --ddp-bucket-size 5000", [0, 1]),
    (
        "tiny",
        24,
        f"--tp 2 --etp 2 --pp 2 --ep 2 --vpp 2 {DISTRIBUTED} --overlap-grad-reduce --ddp-num-buckets 7",
        [0, 1],
    ),
    ("tiny", 8, f"--pp 2 --ep 2 {DISTRIBUTED} --mtp-loss-scaling-factor 0", [1]),
    ("tiny", 8, f"--ep 8 --num-distributed-optimizer-instances 1 {DISTRIBUTED}", [0]),
]
SHORT = {
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
} | {
    "etp": "expert-tensor-parallel-size",
    "vpp": "num-virtual-stages-per-pipeline-rank",
}
WORKER = """
import json, os, sys
from construction import differences
from exact_memory import exact_settings_of
from hymeg.platform import for_gpus
from hymeg.training.arguments import parse
from hymeg.training.preflight import layout_of

results = []
for folder, world_size, flags, ranks in json.load(open(sys.argv[1])):
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world_size)}
    with for_gpus():
        args, config = parse(["--hf-model", folder, "--bf16", *flags])
    results.append(differences(args, config, layout_of(args), exact_settings_of(args), ranks))
json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """For every one of BUILDS how arithmetic and construction differ; in a process of its own, since no other world may
    be open.
    """
    folder = tmp_path_factory.mktemp("built")
    jobs = []
    for name, config in MODELS.items():
        (folder / name).mkdir()
        config.save(folder / name)
    for name, world_size, flags, ranks in BUILDS:
        words = [f"--{SHORT.get(word[2:], word[2:])}" if word.startswith("--") else word for word in flags.split()]
        length = [] if "--seq-length" in words else ["--seq-length", "4096"]
        jobs.append(
            (
                str(folder / name),
                world_size,
                [*words, *length, "--micro-batch-size", "1", "--global-batch-size", "768"],
                ranks,
            )
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-c", WORKER, str(folder / "jobs.json"), str(folder / "results.json")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "number", range(len(BUILDS)), ids=lambda number: f"{BUILDS[number][0]}-{BUILDS[number][1]}-{number}"
)
def test_parameters_buffers_and_shards_are_those_that_megatron_builds(built, number):
    assert built[number] == []
