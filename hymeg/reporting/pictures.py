"""The pictures of a page, as SVG that takes its text colour from the page: for light and dark, without a network.

matplotlib, which is installed anyway: a page of a run is some hundred kilobytes, where plotly's script alone is five
megabytes.
"""

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hymeg.reporting.reading import Run, Series

COLOURS = ("#3b82c4", "#e07b39", "#3fa34d", "#c2528b", "#8a6fd1", "#9a8a2f", "#2fa3a0", "#b0504a")
"""Of the runs, to be seen on white and on black."""
_INK = "#010203"  # that nothing else has: it becomes the page's
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ is one
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.4,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
_MOST_COLUMNS = 400
_MOST_RANKS = 16
"""Rows and columns of a layout that are drawn; the rest is counted."""


def _picture(draw: Callable[..., str]) -> Callable[..., str]:
    """`draw(axes, ...)`, which returns a name, as a function of the rest that returns an `<svg>` element; its ids begin
    with the name, so that several stand in one page.
    """

    @functools.wraps(draw)
    def drawn(*arguments) -> str:
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(6, 2.6), layout="constrained")
            axes = figure.add_subplot()
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.ticklabel_format(axis="y", scilimits=(-2, 6), useOffset=False)
            axes.set_xlabel("step")
            name, text = draw(axes, *arguments), io.StringIO()
            matplotlib.rcParams["svg.hashsalt"] = name
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
        prefix = re.sub(r"\W+", "-", name)
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)
        # Its size is the page's to say.
        size = r'<svg ([^>]*?)(?:width|height)="[^"]*pt" ([^>]*?)(?:width|height)="[^"]*pt"'
        return re.sub(size, r"<svg \1\2", svg, count=1)

    return drawn


def coloured(runs: Sequence[Run]) -> Iterable[tuple[Run, str]]:
    return zip(runs, COLOURS * len(runs), strict=False)


@_picture
def losses(axes: Axes, runs: Sequence[Run]) -> str:
    """In training as lines, held-out as points, of multi-token prediction dashed; saves and resumes marked."""
    for run, colour in coloured(runs):
        for name, series in run.losses.items():
            style = {"linestyle": "--", "alpha": 0.8} if name.startswith("mtp") else {}
            if "," in name:
                style = {"marker": "o", "markersize": 4, "linestyle": ":"}
            axes.plot(*_xy(series), color=colour, label=_label(runs, run, name), **style)
    _mark(axes, runs)
    axes.legend(frameon=False, fontsize=8)
    return "losses"


@_picture
def curve(axes: Axes, runs: Sequence[Run], name: str) -> str:
    """One figure over the steps."""
    for run, colour in coloured(runs):
        if name in run.curves:
            axes.plot(*_xy(run.curves[name]), color=colour, label=run.name)
    _mark(axes, runs)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)
    return f"curve {name}"


@_picture
def scores(axes: Axes, runs: Sequence[Run]) -> str:
    """chrF of held-out translations, with the language pairs behind it, pale."""
    for run, colour in coloured(runs):
        for pair in sorted({pair for line in run.translations for pair in line["pairs"]}):
            lines = (line for line in run.translations if pair in line["pairs"])
            series = [(line["iteration"], line["pairs"][pair]["chrF"]) for line in lines]
            axes.plot(*_xy(series), color=colour, alpha=0.25, linewidth=0.8)
        series = [(line["iteration"], line["overall"]["chrF"]) for line in run.translations]
        axes.plot(*_xy(series), color=colour, marker="o", markersize=4, label=_label(runs, run, "overall"))
    axes.legend(frameon=False, fontsize=8)
    return "chrF"


@_picture
def alarms(axes: Axes, run: Run) -> str:
    """The share of the texts in which each alarm fired; those that never did are left out."""
    names = [name for name in run.translations[0]["alarms"] if any(line["alarms"][name] for line in run.translations)]
    for name, colour in zip(names, COLOURS, strict=False):
        series = [(line["iteration"], 100 * line["alarms"][name]) for line in run.translations]
        axes.plot(*_xy(series), color=colour, marker="o", markersize=4, label=name)
    axes.set_ylim(-2, 102)
    axes.set_ylabel("% of the texts")
    if names:
        axes.legend(frameon=False, fontsize=8)
    return f"alarms {run.name}"


@_picture
def load_over_steps(axes: Axes, run: Run) -> str:
    """Layers x steps: the tokens of the busiest expert over the mean."""
    layers = _with_experts(run)
    load = run.load.max(axis=2).T[layers]  # [layers, iterations]
    parts = np.array_split(load, min(load.shape[1], _MOST_COLUMNS), axis=1)
    values = np.stack([part.mean(axis=1) for part in parts], axis=1)
    first, last = run.load_iterations[0], run.load_iterations[-1]
    _heat(axes, values, (first, max(last, first + 1)), layers)
    return f"load over steps {run.name}"


@_picture
def load_by_expert(axes: Axes, run: Run) -> str:
    """Layers x experts: the tokens of each over the mean, in the last tenth of the run."""
    layers = _with_experts(run)
    counts = run.counts[-max(1, len(run.counts) // 10) :].sum(axis=0)[layers]
    values = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)
    _heat(axes, values, (-0.5, values.shape[1] - 0.5), layers)
    axes.set_xlabel("expert")
    return f"load by expert {run.name}"


def rank_of(layout: dict[str, int], pp: int, dp: int, part: int) -> int:
    """Megatron's order, tp-cp-ep-dp-pp: `part` counts the tensor- and context-parallel ranks of a sample."""
    parts = layout["tensor_model_parallel_size"] * layout["context_parallel_size"]
    return part + parts * (dp + layout["data_parallel_size"] * pp)


def expert_rank_of(layout: dict[str, int], dp: int, part: int) -> int:
    """Whose share of the experts the rank holds: of a stage's ranks each `expert_tensor_parallel_size` share one."""
    in_stage = rank_of(layout, 0, dp, part)
    return in_stage // (layout["expert_tensor_parallel_size"] or 1) % layout["expert_model_parallel_size"]


@_picture
def layout(axes: Axes, run: Run) -> str:
    """Which rank holds what in the last life: a column for each pipeline stage, a row for each data-parallel rank, and
    in it a cell for each of its ranks, coloured by their share of the experts.
    """
    sizes = run.starts[-1]["layout"]
    parts = sizes["tensor_model_parallel_size"] * sizes["context_parallel_size"]
    wanted = sizes["pipeline_model_parallel_size"], sizes["data_parallel_size"], parts
    shown = tuple(min(size, _MOST_RANKS) for size in wanted)
    width = 0.9 / shown[2]
    for pp, dp, part in np.ndindex(*shown):
        colour = COLOURS[expert_rank_of(sizes, dp, part) % len(COLOURS)]
        axes.add_patch(Rectangle((pp + part * width, dp + 0.1), 0.92 * width, 0.8, facecolor=colour, alpha=0.55))
        if shown[0] * shown[2] <= _MOST_RANKS:
            text = str(rank_of(sizes, pp, dp, part))
            axes.text(pp + (part + 0.46) * width, dp + 0.5, text, ha="center", va="center", fontsize=7)
    axes.figure.set_figheight(0.7 + 0.3 * shown[1])
    axes.set_xlabel("")
    axes.set_xlim(-0.05, shown[0])
    axes.set_ylim(shown[1], 0)
    axes.set_xticks([pp + 0.45 for pp in range(shown[0])], [f"stage {pp}" for pp in range(shown[0])], fontsize=7)
    axes.set_yticks([dp + 0.5 for dp in range(shown[1])], [f"DP {dp}" for dp in range(shown[1])], fontsize=7)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    left_out = "" if wanted == shown else f"; drawn are {' x '.join(map(str, shown))}"
    title = f"PP {wanted[0]} x DP {wanted[1]} x {parts} for a sample (TP x CP){left_out}"
    axes.set_title(title, fontsize=8, color=_INK, loc="left")
    return f"layout {run.name}"


def _with_experts(run: Run) -> list[int]:
    return np.flatnonzero(run.counts.sum(axis=(0, 2))).tolist()


def _heat(axes: Axes, values: np.ndarray, extent: tuple[float, float], layers: list[int]) -> None:
    """`values` `[layers, n]`, 1 in the middle of the colours' lower end."""
    axes.figure.set_figheight(min(1.4 + 0.09 * len(layers), 6.0))
    axes.set_ylabel("layer")
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0 if values.min() < 1 else 1,
        extent=(*extent, len(layers) - 0.5, -0.5),
    )
    ticks = range(0, len(layers), -(-len(layers) // 12))
    axes.set_yticks(list(ticks), [str(layers[tick]) for tick in ticks])
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)


def _label(runs: Sequence[Run], run: Run, name: str) -> str:
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _xy(series: Series) -> tuple[list[int], list[float]]:
    return [x for x, _ in series], [y for _, y in series]


def _mark(axes: Axes, runs: Sequence[Run]) -> None:
    """Resumes as vertical lines, saves as triangles at the foot."""
    for run, colour in coloured(runs):
        for iteration in run.resumes:
            axes.axvline(iteration, color=colour, linestyle=(0, (2, 2)), linewidth=1, alpha=0.7)
        if run.saves:
            foot = axes.get_xaxis_transform()
            axes.plot(run.saves, [0.015] * len(run.saves), "^", color=colour, markersize=4, transform=foot, alpha=0.8)
