"""The results of tools/benchmarks/gpu.py as Markdown: python tools/benchmarks/gpu_tables.py gpu.json."""

import json
import sys
from pathlib import Path

GIB = 2**30


def tables(record: dict) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    blocks = [
        f"`{record['command']}` at {machine['commit']}, {machine['device']}, Python {machine['python']}, {versions}"
    ]
    results = record["results"]
    ceilings = next(
        (result for result in results if result["job"]["part"] == "ceilings" and "error" not in result), None
    )
    if ceilings:
        blocks.append(
            f"Ceilings: {ceilings['matmul_tflops']:.4g} TFLOP/s (bf16 matmul), {ceilings['copy_gb_per_s']:.4g} GB/s "
            "(copy, read and write)."
        )
    measured = [result for result in results if result["job"]["part"] in ("steps", "transformers", "flags", "fp8")]
    if measured:
        blocks.append(_steps(measured, ceilings))
    if predicted := [result for result in measured if "predicted" in result]:
        blocks.append(_planner(predicted))
    for result in results:
        if result.get("classes_ms"):
            blocks.append(_profile(result))
    return "\n\n".join(blocks)


def _name(job: dict) -> str:
    flags = job["flags"] or ("recompute" if job["recompute"] else "")
    return f"{job['model']}, {job['layers']} layers | {job['micro_batch_size']} x {job['seq_length']} | {job['engine']} {flags}"


def _steps(results: list[dict], ceilings: dict | None) -> str:
    peers = {
        _batch(result["job"]): result
        for result in results
        if result["job"]["engine"] == "transformers" and "error" not in result
    }
    lines = [
        "| model | batch | what | tokens/s | model TFLOP/s | of the matmul ceiling | peak GiB | tokens/s against "
        "transformers | memory against it |"
    ]
    lines.append("|---" * 9 + "|")
    for result in results:
        if "error" in result:
            lines.append(f"| {_name(result['job'])} | {result['error'].replace('|', '/')[:120]} | | | | | |")
            continue
        share = f"{result['model_tflops'] / ceilings['matmul_tflops']:.1%}" if ceilings else ""
        peer = peers.get(_batch(result["job"])) if result["job"]["engine"] == "hymeg" else None
        ratios = (
            f"{result['tokens_per_s'] / peer['tokens_per_s']:.2f}x | {result['peak_bytes'] / peer['peak_bytes']:.2f}x"
            if peer
            else " | "
        )
        figures = (
            f"{result['tokens_per_s']:,.0f} | {result['model_tflops']:.4g} | {share} | {result['peak_bytes'] / GIB:.1f}"
        )
        lines.append(f"| {_name(result['job'])} | {figures} | {ratios} |")
    return "\n".join(lines)


def _batch(job: dict) -> tuple:
    return job["model"], job["layers"], job["micro_batch_size"], job["seq_length"], job["recompute"]


def _planner(results: list[dict]) -> str:
    lines = [
        "| model | batch | what | planned GiB | measured GiB | off | planned ms | measured ms | off |",
        "|---" * 9 + "|",
    ]
    for result in results:
        cells = []
        for figure, unit in (("peak_bytes", GIB), ("seconds", 1e-3)):
            planned, found = result["predicted"][figure], result[figure]
            cells.append(f"{planned / unit:.1f} | {found / unit:.1f} | {planned / found - 1:+.1%}")
        lines.append(f"| {_name(result['job'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _profile(result: dict) -> str:
    total = sum(result["classes_ms"].values())
    lines = [
        f"One step of {_name(result['job']).replace(' | ', ', ')}, {total:.1f} ms:",
        "",
        "| class | ms | share |",
        "|---|---|---|",
    ]
    return "\n".join(
        [*lines, *(f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in result["classes_ms"].items())]
    )


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
