"""The collectives of a step: which devices take part, what each sends, and how long that takes.

What a device sends follows from the ring algorithms' bandwidth terms (NVIDIA nccl-tests,
doc/PERFORMANCE.md) for a group of n: an all-gather (n - 1) times its part, a reduce-scatter
(n - 1) / n of its input, an all-reduce twice that, an all-to-all (n - 1) / n of its input. Latency
is left out, so times are lower bounds.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from jax.sharding import Mesh

from configs.accelerators import Accelerator
from planning.groups import Groups, groups_by_axes, read_groups
from planning.parts import part_of
from planning.work import Executed


@dataclass(frozen=True)
class Collective:
    kind: str
    part: str
    """Of the model; see planning/parts.py."""
    payload: int
    """Bytes of one device's input."""
    groups: Groups
    axes: tuple[str, ...]
    """Mesh axes along which the groups lie; empty if no choice of axes gives them."""
    times: float
    """Per step."""

    @property
    def group_size(self) -> int:
        return max(len(group) for group in self.groups)

    @property
    def bytes_sent(self) -> float:
        """By one device to others, each time."""
        n = self.group_size
        if self.kind == "all-gather":
            return self.payload * (n - 1)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload if n > 1 else 0.0
        share = self.payload * (n - 1) / n
        return 2 * share if self.kind == "all-reduce" else share

    def seconds(self, accelerator: Accelerator) -> float:
        """Least time of one, from the bandwidths of the links it needs.

        An all-to-all sends every peer its own part, over the device's own network card where the
        peer is elsewhere. The others go round a ring, into which a node's devices put their network
        cards together.
        """
        in_node = _most_in_a_node(self.groups, accelerator.devices_per_node)
        n, sent = self.group_size, self.bytes_sent
        if in_node == n:
            return sent / accelerator.node_bandwidth
        if self.kind in ("all-to-all", "ragged-all-to-all"):
            outside = self.payload * (n - in_node) / n
            inside = sent - outside
            return max(inside / accelerator.node_bandwidth, outside / accelerator.network_bandwidth)
        cards = in_node * accelerator.network_bandwidth
        return sent / min(accelerator.node_bandwidth, cards)


def collectives(program: Iterable[Executed], mesh: Mesh) -> list[Collective]:
    """Those that a step runs, in the order of the program."""
    by_axes = {groups: axes for axes, groups in groups_by_axes(mesh).items()}
    found = []
    for x in program:
        if x.collective is None or not x.times:
            continue
        groups = read_groups(x.instruction.attributes, mesh.size)
        found.append(
            Collective(
                kind=x.collective,
                part=part_of(x),
                payload=sum(o.num_bytes for o in x.computation.operands(x.instruction)),
                groups=groups,
                axes=by_axes.get(groups, ()),
                times=x.times,
            )
        )
    return found


def grouped(
    collectives: Iterable[Collective],
) -> dict[tuple[str, tuple[str, ...]], list[Collective]]:
    """Collectives by kind and mesh axes."""
    found: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for collective in collectives:
        found.setdefault((collective.kind, collective.axes), []).append(collective)
    return found


@functools.cache
def _most_in_a_node(groups: Groups, devices_per_node: int) -> int:
    """The most members that a group has in one node."""
    nodes = (Counter(device // devices_per_node for device in group) for group in groups)
    return max(max(members.values()) for members in nodes)
