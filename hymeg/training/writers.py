"""What is drawn beside the screen: TensorBoard's and Weights & Biases' writers, where Megatron has made them."""

from collections.abc import Mapping

import numpy as np
from megatron.training import get_tensorboard_writer, get_wandb_writer

LINES_PER_HEAT_MAP = 10
_PIXELS = 6  # of a side of an expert's square
_WHITE = 3.0  # times the mean


def write_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    if (tensorboard := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(dict(scalars), iteration)


def write_heat_map(counts: np.ndarray, iteration: int) -> None:
    """The tokens `[layers, experts]` over their layer's mean as a picture, to Weights & Biases. A layer is a row of
    squares, layers without experts are left out: black is none, a third of white the mean, white three times and more.
    """
    if (wandb := get_wandb_writer()) is None:
        return
    load = counts[counts.any(axis=1)]
    load = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    grey = np.rint(np.minimum(load / _WHITE, 1) * 255).astype(np.uint8)
    squares = grey.repeat(_PIXELS, axis=0).repeat(_PIXELS, axis=1)
    caption = "layers x experts: tokens over the mean, from 0 (black) to 3 (white)"
    wandb.log({"expert-load/heat-map": wandb.Image(squares, caption=caption)}, iteration)
