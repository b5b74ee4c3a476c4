"""How long an iteration of training takes when each layer's state crosses devices: computation,
what of the travel is not hidden behind it, and the baselines that papers compare with."""

from pydantic.dataclasses import dataclass

from seqlab.parallel.cost import Link, seconds
from seqlab.settings import STRICT

#: Forward and backward need 6 operations a parameter and token (Kaplan et al., 2020).
FLOPS_A_PARAMETER = 6


@dataclass(frozen=True, config=STRICT)
class Workload:
    """A model of layers whose states travel, one sequence at a time.

    state_bytes, transition_bytes   of one layer, float32
    width, keys                     of a layer's input, and of its queries over all heads
    chunk                           tokens within which a layer attends by products
    """

    parameters: float
    layers: int
    width: int
    keys: int
    state_bytes: int
    transition_bytes: int = 0
    chunk: int = 64


#: What LASP-2 (Sun et al., 2025) trains: 16 layers of width 2048, 16 heads of 128.
LASP2 = Workload(
    parameters=1.2e9, layers=16, width=2048, keys=2048, state_bytes=16 * 128 * 128 * 4, chunk=128
)
#: What ZeCO (Chou et al., 2025) trains: GLA of 1B, 24 layers, 4 heads of 256 by 512.
ZECO = Workload(
    parameters=1.3e9,
    layers=24,
    width=2048,
    keys=1024,
    state_bytes=4 * 256 * 512 * 4,
    transition_bytes=4 * 256 * 4,
)


def compute(work: Workload, tokens: int, link: Link) -> float:
    """Seconds without any travel; `tokens` on each device."""
    return FLOPS_A_PARAMETER * work.parameters * tokens / link.flops


def hides(work: Workload, tokens: int, link: Link) -> float:
    """Seconds of a layer's forward pass that need no state from before: queries, chunks inside."""
    flops = 2 * work.width * work.keys + 4 * work.chunk * work.width
    return tokens * flops / link.flops


def iteration(
    strategy: str, work: Workload, tokens: int, devices: int, link: Link, *, overlap: bool = True
) -> float:
    """Seconds, with `tokens` on each device; without overlap all travel is waited for."""
    travel = seconds(strategy, work.state_bytes, work.transition_bytes, devices, link)
    hidden = hides(work, tokens, link) if overlap else 0.0
    return compute(work, tokens, link) + 2 * work.layers * max(0.0, travel - hidden)


def lasp1(work: Workload, tokens: int, devices: int, link: Link, attend: float = 4.9e-8) -> float:
    """LASP-1 (Sun et al., 2024): a device attends to all its tokens between receiving and sending.

    Devices do not wait for each other between layers, so the wave crosses them once forward and
    once backward. `attend` is the one fitted number: seconds a token of a layer's forward pass
    inside the chain, 1.6 ms for 32,768 tokens; backward takes twice that.
    """
    return compute(work, tokens, link) + (devices - 1) * (
        3 * attend * tokens + 2 * _hop(work, devices, link)
    )


def ring_attention(
    work: Workload, tokens: int, devices: int, link: Link, flops: float = 80e12
) -> float:
    """Ring Attention (Liu et al., 2023) over linear layers, as LASP-2's paper compares with it: at
    each of devices - 1 steps a state moves on and is multiplied with the queries of its host.

    flops: what so thin a product reaches a second (assumed); backward takes two of them.
    """
    product = 2 * tokens * work.state_bytes / 4 / flops
    step = 3 * product + 2 * _hop(work, devices, link)
    return compute(work, tokens, link) + work.layers * (devices - 1) * step


def _hop(work: Workload, devices: int, link: Link) -> float:
    """Seconds of an average step to the next device."""
    return seconds("ring", work.state_bytes, 0, devices, link) / (devices - 1)
