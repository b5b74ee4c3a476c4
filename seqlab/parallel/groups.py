"""Sequences of many lengths on one set of devices: short ones side by side on few devices each,
long ones on many, in the manner of FlexSP (Wang et al., 2025). The assignment is a mixed integer
program that scipy's HiGHS solves on the host.

That pays where softmax attention does. Layers whose states travel need no groups: packed on one
token axis, every document uses just the devices it spans (`parallel.packing`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from scipy.optimize import Bounds, LinearConstraint, milp

from seqlab.errors import ConfigError, DataError
from seqlab.parallel.cost import Link
from seqlab.settings import STRICT

BUCKETS = 12  # lengths that are told apart in one program: its size grows with them
FINEST = 512  # lengths that buckets are made of: their choice takes the square of that


@dataclass(frozen=True, config=STRICT)
class Costs:
    """Seconds that a sequence takes on a group of devices, forward and backward.

    token     a token, all that is linear in length: products, layers whose states travel
    attend    a pair of tokens, in all softmax layers
    exchange  a token that changes device in all softmax layers (Ulysses' all-to-all)
    far       a token that goes to another node; `node`: devices of one, None for all there are
    hop       a state passed on to the next device, in all layers whose states travel
    start     of a group that does anything at all
    """

    token: PositiveFloat
    attend: NonNegativeFloat = 0.0
    exchange: NonNegativeFloat = 0.0
    far: NonNegativeFloat = 0.0
    node: PositiveInt | None = None
    hop: NonNegativeFloat = 0.0
    start: NonNegativeFloat = 0.0

    def seconds(self, length, devices):
        """Of one sequence; arrays broadcast."""
        length, devices = np.asarray(length, float), np.asarray(devices, float)
        near = np.minimum(devices, self.node or np.inf)
        sent = (self.exchange * (near - 1) + self.far * (devices - near)) / devices
        work = self.attend * length**2 + (self.token + sent) * length
        return work / devices + self.hop * (devices - 1)


def costs(
    link: Link,
    parameters: float,
    width: int,
    softmax_layers: int = 0,
    linear_layers: int = 0,
    state_bytes: int = 0,
) -> Costs:
    """The costs of training a model, activations in two bytes; causal attention sees half of all
    pairs, and four arrays of the width change hands forward and backward."""
    exchanged = 2 * 4 * 2 * width * softmax_layers
    return Costs(
        token=6 * parameters / link.flops,
        attend=6 * width * softmax_layers / link.flops,
        exchange=exchanged / link.within.bandwidth,
        far=exchanged / link.between.bandwidth if link.between else 0.0,
        node=link.node if link.between else None,
        hop=2 * linear_layers * link.within(state_bytes),
    )


class Group(NamedTuple):
    """Devices that work on some sequences, one after the other; `sequences` are indices."""

    devices: int
    sequences: tuple[int, ...]
    seconds: float


class Plan(NamedTuple):
    """Rounds, one after the other, of groups side by side.

    seconds          predicted, of all rounds
    static_seconds   predicted for the best division into groups of one size, `static_devices`,
                     the longest sequences handed out first
    """

    rounds: tuple[tuple[Group, ...], ...]
    seconds: float
    static_seconds: float
    static_devices: int

    @property
    def speedup(self) -> float:
        return self.static_seconds / self.seconds

    def __str__(self) -> str:
        sizes = sorted({group.devices for groups in self.rounds for group in groups})
        return (
            f"{len(self.rounds)} round(s) of groups of {', '.join(map(str, sizes))} devices: "
            f"{self.seconds:.3g} s, {self.speedup:.2f} times as fast as groups of "
            f"{self.static_devices}."
        )


def plan(
    lengths: Sequence[int],
    devices: int,
    capacity: float,
    costs: Costs,
    *,
    buckets: int = BUCKETS,
    gap: float = 0.01,
    patience: float = 5.0,
) -> Plan:
    """Which devices work on which sequences, so that the slowest group is done soonest.

    lengths   tokens of each sequence; capacity: tokens that fit on one device at a time
    buckets   lengths told apart: with more than that, lengths are rounded up while solving
    gap       how far, relatively, a solution may be from the best
    patience  seconds to look for a better one in each round; as a clock decides, one process has
              to plan for all

    Sequences that do not all fit at once are sorted by length and cut in the fewest rounds that
    do. A group has a power of two of devices. Raises DataError for a sequence that fits nowhere.
    """
    sizes = [2**i for i in range(devices.bit_length()) if 2**i <= devices]
    _check(lengths, sizes, capacity)
    large = [size for size in sizes if size * capacity >= max(lengths)]
    still = [_rounds(lengths, devices, capacity, _even(costs, size))[0] for size in large]
    static = min(zip(still, large, strict=True))
    limits = {"disp": False, "mip_rel_gap": gap, "time_limit": patience}

    def evenly(lengths, devices, capacity):
        options = [_even(costs, size)(lengths, devices, capacity) for size in sizes]
        return min((groups for groups in options if groups), key=_slowest, default=None)

    def solved(lengths, devices, capacity):
        return _solved(lengths, sizes, devices, capacity, costs, buckets, limits)

    def fits(lengths, devices, capacity):
        return evenly(lengths, devices, capacity) or solved(lengths, devices, capacity)

    _, rounds = _rounds(lengths, devices, capacity, fits)
    better = [_improved(groups, lengths, devices, capacity, solved) for groups in rounds]
    return Plan(tuple(better), sum(map(_slowest, better)), *static)


def _check(lengths: Sequence[int], sizes: list[int], capacity: float) -> None:
    if not sizes or capacity <= 0:
        raise ConfigError(
            f"Sequences cannot be laid on {sizes[-1] if sizes else 0} devices of {capacity} tokens "
            "each: give at least one of each."
        )
    if not len(lengths):
        raise DataError("There is no sequence to assign: give the length of at least one.")
    for index, length in enumerate(lengths):
        if length < 1:
            raise DataError(f"Sequence {index} has {length} tokens: leave out empty ones.")
        if length > sizes[-1] * capacity:
            raise DataError(
                f"Sequence {index} has {length} tokens but a group of {sizes[-1]} devices holds "
                f"only {sizes[-1] * capacity:g}: cut it, or take more devices."
            )


def _rounds(lengths, devices, capacity, solve):
    """(seconds, rounds) with the fewest cuts of the sorted lengths for which `solve` finds groups;
    infinity where it finds none."""
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    tokens = np.cumsum(lengths[order])
    for count in range(max(1, math.ceil(tokens[-1] / (devices * capacity))), len(order) + 1):
        cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, count) / count)
        parts = [part for part in np.split(order, cuts) if len(part)]
        rounds = []
        while len(rounds) < len(parts) and None not in rounds:
            rounds.append(solve(lengths[parts[len(rounds)]], devices, capacity))
        if None not in rounds:
            rounds = [_named(*pair) for pair in zip(rounds, parts, strict=True)]
            return sum(map(_slowest, rounds)), rounds
    return math.inf, []


def _named(groups: Sequence[Group], part: np.ndarray) -> tuple[Group, ...]:
    """Groups of a part of the sequences, by their indices among all of them."""
    return tuple(g._replace(sequences=tuple(part[list(g.sequences)].tolist())) for g in groups)


def _improved(groups, lengths, devices, capacity, solve):
    """The same sequences in the groups that `solve` finds, if those are done sooner."""
    part = np.array([index for group in groups for index in group.sequences])
    found = solve(np.asarray(lengths)[part], devices, capacity)
    return min(groups, _named(found, part), key=_slowest) if found else groups


def _slowest(groups: Sequence[Group]) -> float:
    return max(group.seconds for group in groups)


def _even(costs: Costs, size: int):
    """A solver with groups of one size: the longest first, to the group that is done soonest."""

    def solve(lengths, devices, capacity):
        held, taken = np.zeros((2, devices // size))
        members: list[list[int]] = [[] for _ in held]
        times = costs.seconds(lengths, size)
        for index in np.argsort(-lengths, kind="stable").tolist():
            fits = held + lengths[index] <= size * capacity
            if not fits.any():
                return None
            best = int(np.argmin(np.where(fits, taken, np.inf)))
            members[best].append(index)
            held[best] += lengths[index]
            taken[best] += times[index]
        return tuple(_group(size, m, lengths, costs) for m in members if m)

    return solve


def _group(size: int, members: list[int], lengths: np.ndarray, costs: Costs) -> Group:
    time = costs.seconds(lengths[members], size).sum() + (costs.start if members else 0.0)
    return Group(size, tuple(members), float(time))


def _solved(lengths, sizes, devices, capacity, costs, buckets, limits):
    """Groups of any sizes from the mixed integer program; None where none is found.

    x[k, p] sequences of bucket k go to candidate p, used[p] says whether p is a group at all, and
    no group takes longer than `most`, which is least.
    """
    ends = _buckets(np.sort(lengths), buckets)
    bounds = np.sort(lengths)[ends - 1]
    counts = np.diff(ends, prepend=0)
    candidate = np.repeat(sizes, [devices // size for size in sizes])
    K, P = len(bounds), len(candidate)
    time = costs.seconds(bounds[:, None], candidate)  # [K, P]
    unit = time.max()
    alone = np.eye(P)
    of_each = lambda a: (alone[:, None] * a).reshape(P, K * P)  # sums over the buckets of each p
    rows = lambda x, used, most, low, high: LinearConstraint(
        np.hstack([x, used, np.broadcast_to(most, (len(x), 1))]), low, high
    )
    none = np.zeros((P, K * P))
    twins = (np.roll(candidate, 1) == candidate) & (np.arange(P) > 0)
    after = np.where(twins[:, None], alone - np.eye(P, k=-1), 0)
    solution = milp(
        np.eye(K * P + P + 1)[-1],
        constraints=[
            rows(np.kron(np.eye(K), np.ones(P)), np.zeros((K, P)), 0, counts, counts),
            rows(of_each(bounds[:, None] / candidate), 0 * alone, 0, -np.inf, capacity),
            rows(of_each(time / unit), costs.start / unit * alone, -1, -np.inf, 0),
            rows(of_each(np.ones((K, P))), -len(lengths) * alone, 0, -np.inf, 0),
            rows(none[:1], candidate[None], 0, 0, devices),
            rows(none, after, 0, -np.inf, 0),  # of equal candidates the first are used
        ],
        integrality=np.r_[np.ones(K * P + P), 0],
        bounds=Bounds(0, np.r_[np.repeat(counts, P), np.ones(P), np.inf]),
        options=limits,
    )
    if solution.x is None:
        return None
    x = np.rint(solution.x[: K * P]).astype(int).reshape(K, P)
    return _dealt(x, ends, candidate, lengths, costs)


def _dealt(x, ends, candidate, lengths, costs) -> tuple[Group, ...]:
    """From numbers of sequences to sequences: the longest of a bucket to the group done soonest."""
    members: list[list[int]] = [[] for _ in candidate]
    taken, left = np.zeros(len(candidate)), x.copy()
    order = np.argsort(lengths, kind="stable")
    for k in reversed(range(len(ends))):
        for index in order[ends[k - 1] if k else 0 : ends[k]][::-1].tolist():
            p = int(np.argmin(np.where(left[k] > 0, taken, np.inf)))
            members[p].append(index)
            left[k, p] -= 1
            taken[p] += costs.seconds(lengths[index], candidate[p])
    pairs = zip(candidate.tolist(), members, strict=True)
    return tuple(_group(size, m, lengths, costs) for size, m in pairs if m)


def _buckets(lengths: np.ndarray, most: int) -> np.ndarray:
    """Where each of at most so many buckets of sorted lengths ends, so that rounding every length
    up to the longest of its bucket adds the fewest tokens (dynamic programming)."""
    values, counts = np.unique(lengths, return_counts=True)
    kept = np.unique(np.linspace(0, len(values) - 1, FINEST).round().astype(int))
    values, ends = values[kept], np.cumsum(counts)[kept]
    before = np.r_[0, ends]
    sums = np.r_[0, np.cumsum(values * np.diff(before))]
    # added[i, j]: tokens added when values i to j make a bucket
    added = values[None] * (ends[None] - before[:-1, None]) - (sums[None, 1:] - sums[:-1, None])
    added = np.where(np.tri(len(values), k=-1), np.inf, added.astype(float))
    least, choices = added[0], []
    for _ in range(min(most, len(values)) - 1):
        total = np.r_[0, least[:-1]][:, None] + added
        total[0] = added[0]
        choices.append(np.argmin(total, axis=0))
        least = np.min(total, axis=0)
    last, cuts = len(values) - 1, []
    for choice in reversed(choices):
        cuts.append(last)
        first = int(choice[last])
        if first == 0:
            break
        last = first - 1
    else:
        cuts.append(last)
    return ends[np.array(cuts[::-1])]
