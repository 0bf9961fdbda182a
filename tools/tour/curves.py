"""The losses of the demo's two trainings: read, held against each other, drawn."""

from pathlib import Path

from tour.screen import fail

FIRST, SECOND = "TP2 x PP2, EP2", "CP2, EP2"
NUM_STEPS_TWICE = 4  # trained under both layouts: their losses must agree
LARGEST_DIFFERENCE = 1e-3
"""Of those losses: 1e-6 by rounding, 1e-4 where it decides between two experts; a step of training moves them by 1e-1.
"""


def read_losses(folder: Path) -> dict[int, float]:
    """Step -> loss, unrounded, as the trainer wrote it for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}


def draw(first: dict[int, float], second: dict[int, float], saved: int, path: Path) -> None:
    """The loss against the step, and the hand-over under a magnifying glass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(10, 6), dpi=150, layout="constrained")
    inset = axes.inset_axes((0.57, 0.57, 0.42, 0.36))
    rings = {"marker": "o", "markerfacecolor": "none", "markeredgewidth": 1.5}
    for place, size, height in ((axes, 6, 0.45), (inset, 9, 1)):
        place.axvline(saved, ymax=height, color="#888888", linestyle="--", linewidth=1)
        place.plot(
            first.keys(), first.values(), color="#1f6fb4", linewidth=2, marker="o", markersize=size / 2, label=FIRST
        )
        place.plot(
            second.keys(), second.values(), color="#e6671e", linewidth=1.2, markersize=size, label=SECOND, **rings
        )
        place.grid(color="#e8e8e8")
        place.set_axisbelow(True)
    near = [
        loss for losses in (first, second) for step, loss in losses.items() if abs(step - saved) <= NUM_STEPS_TWICE + 1
    ]
    margin = 0.15 * (max(near) - min(near))
    inset.set(
        xlim=(saved - NUM_STEPS_TWICE - 1.5, saved + NUM_STEPS_TWICE + 1.5),
        ylim=(min(near) - margin, max(near) + margin),
    )
    inset.set_title(f"steps {saved + 1} to {saved + NUM_STEPS_TWICE}, trained under both", fontsize=10)
    inset.tick_params(labelsize=8)
    axes.indicate_inset_zoom(inset, edgecolor="#888888")
    axes.annotate(
        f"saved at step {saved}, resumed ",
        (saved, 0.02),
        xycoords=("data", "axes fraction"),
        ha="right",
        color="#666666",
        fontsize=10,
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title("A tiny Hy-MT2: one training, on four processes and on two", fontsize=14, pad=12)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path)


def compare(first: dict[int, float], second: dict[int, float], log: Path) -> float:
    """Print the steps that both layouts trained. Returns the largest difference of their losses; ends the demo if it is
    more than rounding.
    """
    both = sorted(first.keys() & second.keys())
    if len(both) != NUM_STEPS_TWICE:
        fail(f"{NUM_STEPS_TWICE} steps should be trained under both layouts, and {both} were", log)
    print(f"\n  step  loss under {FIRST}  under {SECOND}  difference")
    for step in both:
        print(f"  {step:>4} {first[step]:26.6f} {second[step]:21.6f} {abs(first[step] - second[step]):11.1e}")
    difference = max(abs(first[step] - second[step]) for step in both)
    if not difference <= LARGEST_DIFFERENCE:
        fail(f"the loss jumps by {difference:.1e} from one layout to the other", log)
    return difference
