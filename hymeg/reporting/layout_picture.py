"""Which rank holds what, drawn: a column for each pipeline stage, a row for each data-parallel rank."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

_MOST = 16
"""Rows and columns that are drawn; the rest is counted."""


def rank_of(layout: dict[str, int], pp: int, dp: int, part: int) -> int:
    """Megatron's order, tp-cp-ep-dp-pp: `part` counts the tensor- and context-parallel ranks of a sample."""
    parts = layout["tensor_model_parallel_size"] * layout["context_parallel_size"]
    return part + parts * (dp + layout["data_parallel_size"] * pp)


def expert_rank_of(layout: dict[str, int], dp: int, part: int) -> int:
    """Whose share of the experts the rank holds: of a stage's ranks each `expert_tensor_parallel_size` share one."""
    in_stage = part + layout["tensor_model_parallel_size"] * layout["context_parallel_size"] * dp
    return in_stage // (layout["expert_tensor_parallel_size"] or 1) % layout["expert_model_parallel_size"]


def layout_height(layout: dict[str, int]) -> float:
    """Of the picture, in inches."""
    return 0.7 + 0.3 * min(layout["data_parallel_size"], _MOST)


def draw_layout(axes: Axes, layout: dict[str, int], colours: Sequence[str], ink: str) -> None:
    """A cell for each rank, coloured by its share of the experts."""
    stages, rows = layout["pipeline_model_parallel_size"], layout["data_parallel_size"]
    parts = layout["tensor_model_parallel_size"] * layout["context_parallel_size"]
    shown = min(stages, _MOST), min(rows, _MOST), min(parts, _MOST)
    for pp in range(shown[0]):
        for dp in range(shown[1]):
            for part in range(shown[2]):
                width = 0.9 / shown[2]
                colour = colours[expert_rank_of(layout, dp, part) % len(colours)]
                axes.add_patch(
                    Rectangle((pp + part * width, dp + 0.1), 0.92 * width, 0.8, facecolor=colour, alpha=0.55)
                )
                if shown[0] * shown[2] <= _MOST:
                    text = str(rank_of(layout, pp, dp, part))
                    axes.text(pp + (part + 0.46) * width, dp + 0.5, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(-0.05, shown[0])
    axes.set_ylim(shown[1], 0)
    axes.set_xticks([pp + 0.45 for pp in range(shown[0])], [f"stage {pp}" for pp in range(shown[0])], fontsize=7)
    axes.set_yticks([dp + 0.5 for dp in range(shown[1])], [f"DP {dp}" for dp in range(shown[1])], fontsize=7)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    left_out = "" if (stages, rows, parts) == shown else f"; drawn are {' x '.join(map(str, shown))}"
    axes.set_title(
        f"PP {stages} x DP {rows} x {parts} for a sample (TP x CP){left_out}", fontsize=8, color=ink, loc="left"
    )
