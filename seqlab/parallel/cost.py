"""What it costs to carry a state across devices, by strategy: a LogGP model (Alexandrov et al.,
1995) with a latency and a bandwidth for each network tier and a gap between successive sends.

Times are seconds of one layer and one direction, with nothing hidden behind computation; the
backward pass costs the same again. Sizes are bytes on one device. The numbers of a `Link` are
assumptions from data sheets, each marked, and not measurements of a machine.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from seqlab.errors import ConfigError, nearest


class Tier(NamedTuple):
    """One network: latency in seconds a message, bandwidth in bytes a second and direction."""

    latency: float
    bandwidth: float

    def __call__(self, size: float) -> float:
        """Seconds until a message of `size` bytes has arrived."""
        return self.latency + size / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins devices, and what a device does by itself.

    within   the network between neighbours; for a torus, one link of it
    between  the network between nodes of `node` devices; None where all devices are neighbours
    gather   a step of an all-gather; its bandwidth is that of all links it uses at once
    gap      seconds between the beginnings of two sends of one device
    hbm      bytes a second to and from a device's memory
    flops    floating-point operations a second that training reaches, about 55% of the peak
    torus    a message to the d-th neighbour occupies d links, where a switch knows no distance
    """

    name: str
    within: Tier
    gather: Tier
    gap: float
    hbm: float
    flops: float
    between: Tier | None = None
    node: int = 1
    torus: bool = False

    def remote_copies(self) -> "Link":
        """The same with sends started by a kernel: no program step between them (assumed)."""
        return dataclasses.replace(
            self, within=self.within._replace(latency=min(self.within.latency, 1e-6)), gap=3e-7
        )


# GPUs: NVLink reaches two thirds of its rate (300, 450 GB/s a direction), InfiniBand half of
# 200 Gb/s beside an A100 and nine tenths of 400 Gb/s beside an H100; a kernel launch and a send
# take 5 us, 12 us through a network card. All-gather bandwidths are NCCL's over both tiers; that of
# h100 is chosen so that All-Scan's advantage at 256 GPUs comes near the one its paper reports.
A100 = Link(
    "a100", Tier(5e-6, 200e9), Tier(6e-6, 80e9), 5e-6, 1.5e12, 140e12, Tier(12e-6, 12.5e9), 8
)
H100 = Link(
    "h100", Tier(5e-6, 300e9), Tier(5e-6, 100e9), 3e-6, 2.6e12, 400e12, Tier(12e-6, 45e9), 8
)
# TPUs: nine tenths of a link's rate (50, 100, 112 GB/s a direction); an all-gather goes both ways
# round. A step of a loop in a compiled program takes 2 us with its send.
V5E = Link("v5e", Tier(2e-6, 45e9), Tier(1.5e-6, 90e9), 2e-6, 0.75e12, 110e12, torus=True)
V5P = Link("v5p", Tier(2e-6, 90e9), Tier(1.5e-6, 180e9), 2e-6, 2.5e12, 250e12, torus=True)
V6E = Link("v6e", Tier(2e-6, 100e9), Tier(1.5e-6, 200e9), 2e-6, 1.5e12, 500e12, torus=True)
# Virtual devices of one process: a send is a meeting of threads and a copy in shared memory.
CPU = Link("cpu", Tier(5e-5, 4e9), Tier(5e-5, 4e9), 5e-5, 1e10, 5e10)

LINKS = {link.name: link for link in (A100, H100, V5E, V5P, V6E, CPU)}

#: What `jax.Device.device_kind` says -> name of a link; the first that occurs in it counts.
_KINDS = {
    **{"v5 lite": "v5e", "v5e": "v5e", "v6": "v6e", "v5": "v5p", "7x": "v6e", "v4": "v5p"},
    **{"a100": "a100", "h100": "h100", "h200": "h100", "b200": "h100", "gh200": "h100"},
}
#: The link of a kind that is not known, by platform.
_PLATFORMS = {"tpu": "v5e", "gpu": "a100", "cuda": "a100", "rocm": "a100", "cpu": "cpu"}

#: The strategies that are exact for any document, the simplest first.
EXACT = ("all_gather", "ring", "all_scan", "doubling", "two_level")

#: A device that takes in a state reads it, reads its own update, and writes the sum.
PASSES = 3

MOST_BLOCKS = 128


class Choice(NamedTuple):
    """A strategy, what the model says it takes, and a sentence on the alternatives."""

    strategy: str
    seconds: float
    why: str


def seconds(
    strategy: str,
    state_bytes: float,
    transition_bytes: float,
    devices: int,
    link: Link,
    blocks: int | None = None,
    row: int | None = None,
    hops: int | None = None,
) -> float:
    """Seconds until every device has the state that enters its shard; one layer, one direction.

    state_bytes       of one device: all its rows and heads
    transition_bytes  what it sends beside the state where transitions are composed: decays, or
                      the matrices of a delta rule
    blocks, row, hops as in `parallel.mesh.Travel`; None is what suits (for hops, one)
    """
    if strategy == "auto":
        return choose(state_bytes, transition_bytes, devices, link).seconds
    if strategy not in _SECONDS:
        raise ConfigError(f"There is no strategy {strategy!r}: {nearest(strategy, _SECONDS)}")
    if devices == 1:
        return 0.0
    choices = {"blocks": blocks, "row": row, "hops": hops}
    return _SECONDS[strategy](float(state_bytes), float(transition_bytes), devices, link, **choices)


def choose(
    state_bytes: float,
    transition_bytes: float,
    devices: int,
    link: Link | None = None,
    among: tuple[str, ...] = EXACT,
) -> Choice:
    """The fastest strategy that is exact for any document, and a sentence that says why.

    link    None is that of this machine's devices
    among   strategies to choose from
    """
    link = link or this_link()
    times = {
        name: seconds(name, state_bytes, transition_bytes, devices, link)
        for name in among
        if name != "two_level" or rows(devices)
    }
    best = min(times, key=lambda name: times[name])
    if devices == 1:
        return Choice(best, 0.0, f"{best}: on one device no state travels")
    peers = f"{devices} {link.name} devices"
    why = f"{best}: {_shown(times[best])} a layer on {peers} by the cost model"
    others = sorted((t, name) for name, t in times.items() if name != best)
    if others:
        would = ", ".join(f"{name} {_shown(t)}" for t, name in others)
        why += f"; {would}"
    return Choice(best, times[best], why)


def best_blocks(state_bytes: float, devices: int, link: Link) -> int:
    """Blocks for `all_scan`: a power of two. Many small ones keep more devices at work at once, few
    large ones cost less latency; near sqrt(state_bytes (P - 2) / (latency bandwidth))."""
    powers = [2**i for i in range(MOST_BLOCKS.bit_length())]
    return min(powers, key=lambda k: _pipeline(state_bytes, devices, link, k))


def best_row(state_bytes: float, transition_bytes: float, devices: int, link: Link) -> int:
    """Devices in a row for `two_level`; ConfigError where `devices` has no divisor."""
    if not rows(devices):
        raise ConfigError(
            f"{devices} devices cannot be laid in rows for two_level: take a mesh.seq that is not "
            "a prime number, or another strategy."
        )
    cost = lambda row: seconds("two_level", state_bytes, transition_bytes, devices, link, row=row)
    return min(rows(devices), key=cost)


def rows(devices: int) -> list[int]:
    """The row lengths that divide the devices into several rows of several devices."""
    return [row for row in range(2, devices // 2 + 1) if devices % row == 0]


def this_link() -> Link:
    """The link that the first device's kind suggests; of unknown kinds, that of its platform."""
    device = jax.devices()[0]
    kind = device.device_kind.lower()
    named = [name for part, name in _KINDS.items() if part in kind]
    return LINKS[named[0] if named else _PLATFORMS.get(device.platform, "a100")]


def _all_gather(state, transition, devices, link, **_):
    fold = PASSES * devices * state / link.hbm
    return (devices - 1) * link.gather(state + transition) + fold


def _ring(state, transition, devices, link, **_):
    return _pipeline(state, devices, link, blocks=1)


def _all_scan(state, transition, devices, link, blocks=None, **_):
    return _pipeline(state, devices, link, blocks or best_blocks(state, devices, link))


def _doubling(state, transition, devices, link, **_):
    """Every step's slowest message counts: some cross from node to node whatever the distance."""
    tier, sent = _slowest(devices, link), state + transition
    total = tier(state)  # at the end all move by one, since a device's own tokens come after
    for step in range(math.ceil(math.log2(devices))):
        far = 2**step if link.torus else 1
        load = min(far, devices - far) if link.torus else 1
        total += tier.latency * far + sent * load / tier.bandwidth + PASSES * sent / link.hbm
    return total


def _two_level(state, transition, devices, link, blocks=None, row=None, **_):
    """As in `parallel.two_level`: All-Scan of transitions in each row, their totals handed out in
    parts, a ring of parts across the rows, and the parts gathered."""
    if row is None:
        row = best_row(state, transition, devices, link)
    if row < 1 or devices % row:
        raise ConfigError(f"A row of {row} does not divide {devices} devices: change mesh.row.")
    if row in (1, devices):
        return _all_scan(state, transition, devices, link, blocks)
    sent, part = state + transition, state / row
    inner = _all_scan(sent, 0, row, link, blocks)
    hand_out = (row - 1) * (link.gather(sent / row) + link.gather(part))
    return inner + hand_out + _pipeline(part, devices // row, _across_rows(link, row), blocks=1)


def _window(state, transition, devices, link, hops=None, **_):
    hop = _slowest(devices, link)(state) + PASSES * state / link.hbm
    return min(hops or 1, devices - 1) * hop


_SECONDS = {
    "all_gather": _all_gather,
    "ring": _ring,
    "all_scan": _all_scan,
    "doubling": _doubling,
    "two_level": _two_level,
    "window": _window,
}


def _pipeline(state: float, devices: int, link: Link, blocks: int) -> float:
    """Device after device in blocks: the way of the first, then a gap for each of the others."""
    block = state / blocks
    add = PASSES * block / link.hbm
    crossings = (devices - 1) // link.node if link.between else 0
    hops = (devices - 1 - crossings) * (link.within(block) + add)
    if link.between:
        hops += crossings * (link.between(block) + add)
    slowest = _slowest(devices, link)
    return hops + (blocks - 1) * max(link.gap, block / slowest.bandwidth + add)


def _slowest(devices: int, link: Link) -> Tier:
    """The network that the slowest neighbours among so many devices share."""
    return link.between if link.between and devices > link.node else link.within


@functools.cache
def _across_rows(link: Link, row: int) -> Link:
    """The link as rows of devices see it: a node holds fewer of them."""
    if link.between is None:
        return link
    if row >= link.node:
        return dataclasses.replace(link, within=link.between, between=None)
    return dataclasses.replace(link, node=link.node // row)


def _shown(time: float) -> str:
    return f"{1e3 * time:.2f} ms" if time >= 1e-4 else f"{1e6 * time:.0f} us"
