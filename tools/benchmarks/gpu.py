"""What hymeg does with one GPU: ceilings, training steps of real-width slices of both models, transformers beside it,
where the time goes, and what the planner said.

    python tools/benchmarks/gpu.py --json gpu.json [--parts ceilings,steps,transformers,profile,flags,fp8] [--minutes 9]
    [--tiny]

Every configuration runs in a process of its own, so that one that runs out of memory ends nothing else, and its result
is in the JSON before the next starts. What the JSON holds already is not run again: a run that was cut off goes on with
the same command. `--tiny` takes small widths and runs on CPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("ceilings", "steps", "transformers", "profile", "flags", "fp8")
COMMON = {
    "vocab_size": 120832,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "initializer_range": 0.006,
    "max_position_embeddings": 262144,
}
WIDTHS = {
    "Hy-MT2": COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 6912,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
    }
    | {"moe_intermediate_size": 768, "expert_hidden_dim": 768},
    "Hy3": COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 13312,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_experts": 192,
    }
    | {"moe_intermediate_size": 1536, "expert_hidden_dim": 1536},
}
BALANCED = "--moe-router-force-load-balancing"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# To be measured one by one against the defaults (docs/gpu.md).
CANDIDATES = (
    "--moe-permute-fusion",
    "--moe-router-fusion",
    "--moe-permute-fusion --moe-router-fusion",
    "--cross-entropy-loss-fusion",
    "--recompute-logits",
    "--manual-gc --manual-gc-interval 100",
    "--overlap-grad-reduce --overlap-param-gather",
    "--no-gradient-accumulation-fusion",
    "--use-precision-aware-optimizer",
    "--no-check-for-nan-in-loss-and-grad",
)
FP8 = (
    "--fp8-format hybrid --fp8-recipe blockwise",
    "--fp8-format hybrid --fp8-recipe tensorwise",
)
TINY_CANDIDATES = ("--recompute-logits", "--cross-entropy-loss-fusion")


def job(
    part: str, engine: str, model: str, sequence: tuple[int, int], flags: str = "", recompute: bool = False, **other
) -> dict:
    """`sequence` is micro-batch size and sequence length."""
    if recompute and engine == "hymeg":
        flags = f"{flags} {RECOMPUTE}".strip()
    fields = {
        "part": part,
        "engine": engine,
        "model": model,
        "micro_batch_size": sequence[0],
        "seq_length": sequence[1],
        "flags": flags,
    }
    return fields | {"recompute": recompute, "profile": False} | other


def jobs(parts: list[str], tiny: bool) -> list[dict]:
    """In the order in which they matter."""
    short, long = ((1, 64), (1, 128)) if tiny else ((1, 4096), (1, 8192))
    twice, four = (2, short[1]), (4, short[1])
    found = [job("ceilings", "ceilings", "", (0, 0))]
    for model in WIDTHS:
        best = (2, short[1])
        found += [job("steps", "hymeg", model, size, BALANCED) for size in (twice, short, four, long)]
        found += [job("steps", "hymeg", model, best), job("steps", "hymeg", model, four, BALANCED, recompute=True)]
        found += [job("transformers", "transformers", model, size) for size in (twice, short, long)]
        found += [job("transformers", "transformers", model, four, recompute=True)]
        found += [
            job("profile", engine, model, best, BALANCED if engine == "hymeg" else "", profile=True)
            for engine in ("hymeg", "transformers")
        ]
    found += [
        job("flags", "hymeg", "Hy-MT2", twice, f"{BALANCED} {flags}")
        for flags in (TINY_CANDIDATES if tiny else CANDIDATES)
    ]
    if not tiny:
        found += [job("fp8", "hymeg", model, twice, f"{BALANCED} {flags}") for model in WIDTHS for flags in FP8]
    return [one for part in PARTS for one in found if one["part"] == part and part in parts]


def write_slice(folder: Path, widths: dict, num_layers: int) -> None:
    """config.json and a tokenizer: the trainer starts from random weights."""
    from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
    from hymeg.hf.config import HyConfig

    # A checkpoint of two narrow layers, for the tokenizer that comes with it.
    narrow = HyConfig.from_dict(TINY_CONFIG | {"vocab_size": widths["vocab_size"], "num_hidden_layers": 2})
    tokens = write_tiny_checkpoint(folder, narrow)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = {"num_hidden_layers": num_layers, "mlp_layer_types": ["dense"] + ["sparse"] * (num_layers - 1)}
    HyConfig.from_dict(TINY_CONFIG | widths | layers | special).save(folder)


def run_one(one: dict, deadline: float) -> dict:
    """What the worker measured, or `{"error": ...}`."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, written = Path(folder) / "job.json", Path(folder) / "result.json"
        wanted.write_text(json.dumps(one))
        command = [sys.executable, str(HERE / "gpu_worker.py"), str(wanted), str(written)]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(deadline - time.monotonic(), 1),
            )
        except subprocess.TimeoutExpired:
            return {"cut_off": True}
        if done.returncode != 0:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            return {
                "error": next(
                    (line for line in reversed(lines) if "Error" in line or "hymeg:" in line),
                    lines[-1] if lines else "no output",
                )[-400:]
            }
        return json.loads(written.read_text())


def described() -> dict:
    """The machine and the versions, for the record."""
    versions = {}
    for name in ("torch", "megatron-core", "transformers", "transformer-engine", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    device = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    name = subprocess.run([sys.executable, "-c", device], capture_output=True, text=True).stdout.strip()
    return {"device": name, "python": platform.python_version(), "commit": commit, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="results, kept and added to")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--models", default=",".join(WIDTHS), help=f"of {','.join(WIDTHS)}")
    parser.add_argument("--minutes", type=float, default=1e4, help="start nothing after this long, and end what runs")
    parser.add_argument("--steps", type=int, default=13, help="of each configuration, the first three not counted")
    parser.add_argument("--mt2-layers", type=int, default=8)
    parser.add_argument("--hy3-layers", type=int, default=2, help="one dense, the others MoE")
    parser.add_argument(
        "--extra", default="", help="flags for every run of hymeg, e.g. of a machine without Transformer Engine"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if unknown := set(parts := args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: choose from {','.join(PARTS)}")
    record = (
        json.loads(args.json.read_text())
        if args.json.exists()
        else {"machine": described(), "command": " ".join(sys.argv), "results": []}
    )
    deadline = time.monotonic() + 60 * args.minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        layers = {"Hy-MT2": args.mt2_layers, "Hy3": args.hy3_layers}
        for model, widths in WIDTHS.items():
            write_slice(Path(folder) / model, {"vocab_size": 1024} if args.tiny else widths, layers[model])
        for one in jobs(parts, args.tiny):
            if one["model"] not in ("", *args.models.split(",")):
                continue
            one |= {"layers": layers.get(one["model"]), "steps": args.steps, "tiny": args.tiny}
            one["flags"] = f"{one['flags']} {args.extra}".strip() if one["engine"] == "hymeg" else one["flags"]
            if any(result["job"] == one for result in record["results"]) or time.monotonic() > deadline:
                continue
            result = run_one(one | {"folder": str(Path(folder) / one["model"])}, deadline)
            print(
                f"{one['part']} {one['engine']} {one['model']} {one['micro_batch_size']} x {one['seq_length']} "
                f"{one['flags']}: ",
                end="",
            )
            print(
                result.get("error") or {name: value for name, value in result.items() if isinstance(value, float)},
                flush=True,
            )
            if "cut_off" not in result:
                record["results"].append({"job": one, **result})
                partial = args.json.with_suffix(".partial")
                partial.write_text(json.dumps(record, indent=1))
                partial.replace(args.json)
    from gpu_tables import tables

    print("\n" + tables(record))


if __name__ == "__main__":
    main()
