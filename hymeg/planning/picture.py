"""A plan's memory as a picture: one bar a pipeline stage, its parts stacked, up to the line that a GPU can hold."""

import os
from pathlib import Path

from hymeg.errors import UserError
from hymeg.planning.memory import GIB
from hymeg.planning.report import PARTS
from hymeg.planning.search import Machine, Plan, describe

# Okabe and Ito's colours: told apart by everyone.
_COLOURS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#009E73",
    "buffers": "#999999",
    "activations": "#E69F00",
    "working": "#F0E442",
}


def draw(plan: Plan, machine: Machine, path: str | os.PathLike) -> None:
    """Write the picture; the file's ending says the format.

    Raises:
        UserError: the file cannot be written, or the format is none of matplotlib's.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    count, device = len(plan.memory), machine.device
    figure, axes = pyplot.subplots(figsize=(max(7.5, min(18, 3.5 + 0.55 * count)), 5), layout="constrained")
    bottom = [0.0] * count
    for part in PARTS:
        heights = [getattr(stage, part) / GIB for stage in plan.memory]
        if max(heights) < 0.005:
            continue
        axes.bar(
            range(count),
            heights,
            bottom=bottom,
            width=0.72,
            label=part,
            color=_COLOURS[part],
            edgecolor="white",
            linewidth=0.6,
        )
        if count <= 16:
            _write_numbers(axes, heights, bottom, device.gpu_memory, "white" if part == "weights" else "black")
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    if count <= 16:
        for rank, height in enumerate(bottom):
            axes.annotate(
                f"{height:.1f}",
                (rank, height),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                weight="bold",
            )
    axes.axhspan(device.usable / GIB, device.gpu_memory, color="#D55E00", alpha=0.15, linewidth=0, label="reserve")
    axes.axhline(device.usable / GIB, color="#D55E00", linewidth=1.4)
    axes.set_ylim(0, max(device.gpu_memory, max(bottom)) * 1.04)
    axes.set_xlim(-0.7, count - 0.3)
    axes.set_xticks(range(count) if count <= 24 else range(0, count, 4))
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GiB of a GPU")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{machine.num_gpus} x {machine.hardware.name}, {device.gpu_memory:g} GiB\n{_in_two_lines(describe(plan))}"
    axes.set_title(title, fontsize=9.5, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    try:
        figure.savefig(Path(path), dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--picture {path}: cannot be written ({error}); give a file such as plan.png in a folder that exists"
        ) from None
    finally:
        pyplot.close(figure)


def _write_numbers(axes, heights: list[float], bottom: list[float], largest: float, colour: str) -> None:
    """Into the parts that are tall enough."""
    for rank, (height, below) in enumerate(zip(heights, bottom, strict=True)):
        if height > 0.04 * largest:
            axes.text(rank, below + height / 2, f"{height:.1f}", ha="center", va="center", fontsize=8, color=colour)


def _in_two_lines(text: str) -> str:
    first, _, rest = text.partition(", ")
    return f"{first}\n{rest}"
