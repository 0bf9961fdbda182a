"""The machine; who talks to whom over which link: the groups of Megatron's rank order; and how long a collective takes
at best. Estimates; docs/planning.md.
"""

import dataclasses
from typing import NamedTuple

from hymeg.errors import UserError
from hymeg.planning.flops import peak_tflops
from hymeg.planning.layout import Layout
from hymeg.planning.memory import Device


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A GPU and its links. Bandwidths are the data sheets', in GB/s, and one direction's where a link has two."""

    name: str
    memory_gib: int
    hbm: float
    nvlink: float

    @property
    def peak_tflops(self) -> float:
        return peak_tflops(self.name)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("H100", 80, 3350, 450),  # of those with as much memory, what --gpu-memory alone means
        Hardware("A100", 80, 2039, 300),
        Hardware("A800", 80, 2039, 200),
        Hardware("H800", 80, 3350, 200),
        Hardware("H20", 96, 4000, 450),
        Hardware("H200", 141, 4800, 450),
        Hardware("B200", 180, 7700, 900),
        Hardware("GB200", 186, 8000, 900),
        Hardware("B300", 270, 7700, 900),
        Hardware("GB300", 279, 8000, 900),
    )
}
"""From NVIDIA's data sheets, the SXM versions; bf16 peaks stand in `hymeg.planning.flops`."""


def hardware_of(name: str | None, gpu_memory: float | None) -> Hardware:
    """The GPU of that name; without a name, the first that has so much memory; with neither, an H100.

    Raises:
        UserError: `HARDWARE` has no such GPU.
    """
    known = ", ".join(f"{hardware.name} ({hardware.memory_gib})" for hardware in HARDWARE.values())
    if name is not None:
        if name.upper() not in HARDWARE:
            raise UserError(f"--gpu {name}: not a GPU whose speed is known here; it may be {known}")
        return HARDWARE[name.upper()]
    for hardware in HARDWARE.values():
        if gpu_memory in (None, hardware.memory_gib):
            return hardware
    raise UserError(
        f"--gpu-memory {gpu_memory:g}: no GPU known here has so much; give the one whose speed to take with --gpu: "
        f"{known}"
    )


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a run is planned for."""

    num_gpus: int
    gpus_per_node: int
    device: Device
    hardware: Hardware
    network: float = 50.0
    """GB/s between nodes for each GPU: 50 for one 400 Gbit/s card each."""


class Group(NamedTuple):
    """Ranks r, r + stride, r + 2 stride, ..."""

    size: int
    stride: int

    def local(self, gpus_per_node: int) -> int:
        """How many of them share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


def groups(layout: Layout) -> dict[str, Group]:
    """In Megatron's order tp-cp-ep-dp-pp (parallel_state.py): the first changes fastest."""
    tp, per_expert, per_stage = layout.tp, layout.ep * layout.etp, layout.world_size // layout.pp
    return {
        "tp": Group(tp, 1),
        "cp": Group(layout.cp, tp),
        "dp": Group(per_stage // tp, tp),  # data x context parallel: whom gradients are reduced with
        "etp": Group(layout.etp, 1),
        "ep": Group(layout.ep, layout.etp),
        "edp": Group(per_stage // per_expert, per_expert),
        "pp": Group(layout.pp, per_stage),
    }


class Links(NamedTuple):
    """What a rank reaches of its links, bytes a second."""

    gpus_per_node: int
    inside: float
    across: float

    def ring(self, group: Group, num_bytes: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `num_bytes` in all. A node's rings share its cards."""
        local = group.local(self.gpus_per_node)
        speed = self.inside if local == group.size else min(self.inside, local * self.across)
        return num_bytes * (group.size - 1) / group.size / speed

    def all_to_all(self, group: Group, num_bytes: float) -> float:
        """Seconds in which every rank sends `num_bytes`, as much to each, over NVLink and network at the same time."""
        local = group.local(self.gpus_per_node)
        return max(
            num_bytes * (local - 1) / group.size / self.inside,
            num_bytes * (group.size - local) / group.size / self.across,
        )

    def neighbour(self, group: Group, num_bytes: float) -> float:
        """Seconds to send `num_bytes` to the next rank."""
        if group.size == 1:
            return 0.0
        return num_bytes / (self.inside if group.local(self.gpus_per_node) > 1 else self.across)
