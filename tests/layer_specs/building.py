"""Runs worker.py: models constructed under one layer spec, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).parent / "worker.py"
LOCAL, TE = SPECS = ("local", "transformer_engine")


def work(spec: str, jobs: dict[str, dict], folder: Path, *python_path: Path) -> dict[str, dict]:
    """Run worker.py on the jobs (name -> job); `{"spec name": what it wrote}`, and as "spec log" what it printed."""
    listed = [
        {**job, "argv": job["argv"].split(), "out": str(folder / f"{spec} {number}.pt")}
        for number, job in enumerate(jobs.values())
    ]
    jobs_file, log = folder / f"{spec}.json", folder / f"{spec}.log"
    jobs_file.write_text(json.dumps(listed))
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    environment = (
        os.environ
        | world
        | {"PYTHONPATH": os.pathsep.join(map(str, python_path)), "HYMEG_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    )
    with open(log, "w") as output:
        command = [sys.executable, str(WORKER), spec, str(jobs_file)]
        result = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=300)
    assert result.returncode == 0, f"{spec}:\n{log.read_text()[-6000:]}"
    results = {
        f"{spec} {name}": torch.load(job["out"], weights_only=False) for name, job in zip(jobs, listed, strict=True)
    }
    return results | {f"{spec} log": log.read_text()}
