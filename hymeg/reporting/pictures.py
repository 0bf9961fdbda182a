"""The pictures of a page, as SVG that takes its text colour from the page: for light and dark, without a network.

matplotlib, which is installed anyway: a page of a run is some hundred kilobytes, where plotly's script alone is five
megabytes.
"""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hymeg.reporting.layout_picture import draw_layout, layout_height
from hymeg.reporting.reading import Run, Series

COLOURS = ("#3b82c4", "#e07b39", "#3fa34d", "#c2528b", "#8a6fd1", "#9a8a2f", "#2fa3a0", "#b0504a")
"""Of the runs, to be seen on white and on black."""
_INK = "#010203"  # that nothing else has: it becomes the page's
_STYLE = {
    "svg.fonttype": "none",
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


def losses(runs: Sequence[Run]) -> str:
    """In training as lines, held-out as points, of multi-token prediction dashed; saves and resumes marked."""

    def draw(axes: Axes) -> None:
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            for name, series in run.losses.items():
                style = {"linestyle": "--", "alpha": 0.8} if name.startswith("mtp") else {}
                if "," in name:
                    style = {"marker": "o", "markersize": 4, "linestyle": ":"}
                axes.plot(*_xy(series), color=colour, label=_label(runs, run, name), **style)
        _mark(axes, runs)
        axes.legend(frameon=False, fontsize=8)

    return _picture("losses", draw)


def curve(runs: Sequence[Run], name: str) -> str:
    """One figure over the steps."""

    def draw(axes: Axes) -> None:
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            if name in run.curves:
                axes.plot(*_xy(run.curves[name]), color=colour, label=run.name)
        _mark(axes, runs)
        if len(runs) > 1:
            axes.legend(frameon=False, fontsize=8)

    return _picture(f"curve {name}", draw)


def scores(runs: Sequence[Run]) -> str:
    """chrF of held-out translations, with the language pairs behind it, pale."""

    def draw(axes: Axes) -> None:
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            for pair in sorted({pair for line in run.translations for pair in line["pairs"]}):
                series = [
                    (line["iteration"], line["pairs"][pair]["chrF"])
                    for line in run.translations
                    if pair in line["pairs"]
                ]
                axes.plot(*_xy(series), color=colour, alpha=0.25, linewidth=0.8)
            series = [(line["iteration"], line["overall"]["chrF"]) for line in run.translations]
            axes.plot(*_xy(series), color=colour, marker="o", markersize=4, label=_label(runs, run, "overall"))
        axes.legend(frameon=False, fontsize=8)

    return _picture("chrF", draw)


def alarms(run: Run) -> str:
    """The share of the texts in which each alarm fired; those that never did are left out."""
    names = [name for name in run.translations[0]["alarms"] if any(line["alarms"][name] for line in run.translations)]

    def draw(axes: Axes) -> None:
        for name, colour in zip(names, COLOURS, strict=False):
            series = [(line["iteration"], 100 * line["alarms"][name]) for line in run.translations]
            axes.plot(*_xy(series), color=colour, marker="o", markersize=4, label=name)
        axes.set_ylim(-2, 102)
        if names:
            axes.legend(frameon=False, fontsize=8)

    return _picture(f"alarms {run.name}", draw, "% of the texts")


def load_over_steps(run: Run) -> str:
    """Layers x steps: the tokens of the busiest expert over the mean."""
    load = run.load.max(axis=2).T  # [layers, iterations]
    layers = _with_experts(run)
    num_columns = min(load.shape[1], _MOST_COLUMNS)
    parts = np.array_split(load[layers], num_columns, axis=1)
    values = np.stack([part.mean(axis=1) for part in parts], axis=1)

    def draw(axes: Axes) -> None:
        first, last = run.load_iterations[0], run.load_iterations[-1]
        _heat(axes, values, (first, max(last, first + 1)), layers)

    return _picture(f"load over steps {run.name}", draw, "layer", "step", height=_heat_height(layers))


def load_by_expert(run: Run) -> str:
    """Layers x experts: the tokens of each over the mean, in the last tenth of the run."""
    layers = _with_experts(run)
    counts = run.counts[-max(1, len(run.counts) // 10) :].sum(axis=0)[layers]
    values = counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)

    def draw(axes: Axes) -> None:
        _heat(axes, values, (-0.5, values.shape[1] - 0.5), layers)

    return _picture(f"load by expert {run.name}", draw, "layer", "expert", height=_heat_height(layers))


def layout(run: Run) -> str:
    """Which rank holds what, in the run's last life."""

    def draw(axes: Axes) -> None:
        draw_layout(axes, run.starts[-1]["layout"], COLOURS, _INK)

    return _picture(f"layout {run.name}", draw, x_label="", height=layout_height(run.starts[-1]["layout"]))


def _with_experts(run: Run) -> list[int]:
    return np.flatnonzero(run.counts.sum(axis=(0, 2))).tolist()


def _heat_height(layers: list[int]) -> float:
    return min(1.4 + 0.09 * len(layers), 6.0)


def _heat(axes: Axes, values: np.ndarray, extent: tuple[float, float], layers: list[int]) -> None:
    """`values` `[layers, n]`, 1 in the middle of the colours' lower end."""
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
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        for iteration in run.resumes:
            axes.axvline(iteration, color=colour, linestyle=(0, (2, 2)), linewidth=1, alpha=0.7)
        if run.saves:
            foot = axes.get_xaxis_transform()
            axes.plot(run.saves, [0.015] * len(run.saves), "^", color=colour, markersize=4, transform=foot, alpha=0.8)


def _picture(name: str, draw, y_label: str = "", x_label: str = "step", height: float = 2.6) -> str:
    """An `<svg>` element; its ids begin with `name`, so that several stand in one page."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6, height), layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-2, 6), useOffset=False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)
    # Its size is the page's to say.
    return re.sub(
        r'<svg ([^>]*?)(?:width|height)="[^"]*pt" ([^>]*?)(?:width|height)="[^"]*pt"', r"<svg \1\2", svg, count=1
    )
