"""The loss of each data set of a blend, beside the loss over all of them."""

import argparse
from pathlib import Path

import torch
from megatron.training.utils import get_blend_and_blend_per_split

from hymeg.platform import device
from hymeg.training.row_data import row_blends


def training_sets(args: argparse.Namespace) -> list[str]:
    """The names of the data sets that training draws from, in the order of their numbers."""
    if args.sft_rows:
        paths = row_blends(args)[0].paths
    else:
        blend, per_split = get_blend_and_blend_per_split(args)
        paths = ((blend or (per_split or [None])[0]) or ([],))[0]
    return [f"{number}-{Path(path).stem if args.sft_rows else Path(path).name}" for number, path in enumerate(paths)]


class SetLosses:
    """Sums on the device, which is only waited for when they are read.

    Args:
        names: of the data sets.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64)

    def add(self, numbers: torch.Tensor, losses: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Samples of a micro-batch, or this rank's part of them.

        Args:
            numbers: `[b]`, of each sample's data set.
            losses: `[b, s]`, nats, times their weights.
            loss_mask: `[b, s]`, the weights.
        """
        parts = [losses.detach().sum(dim=1, dtype=torch.float64), loss_mask.count_nonzero(dim=1).double()]
        self._sums = self._sums.to(losses.device).index_add_(0, numbers.long(), torch.stack(parts, dim=1))

    def means(self, forget: bool) -> dict[str, float]:
        """Of each data set that anything was trained of since `forget` was last given: the loss of a trained token.
        Collective: every rank calls it; ranks that hold the same losses count alike.
        """
        sums = self._sums.to(device.current(), copy=True)
        torch.distributed.all_reduce(sums)
        if forget:
            self._sums.zero_()
        return {name: loss / count for name, (loss, count) in zip(self.names, sums.tolist(), strict=True) if count}
