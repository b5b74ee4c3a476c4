"""Documents of many lengths in turns: in each turn all devices work on rows of one length, each on
as many devices as that length asks for. Short documents stay on few devices, where attention has
short rows to compare; long ones get many.

`groups` divides devices among groups of different sizes at once. Here groups of one size have all
devices to themselves, one size after the other, so that every turn is the same program on the same
devices, meshed anew. How many turns of each size is a mixed integer program that HiGHS solves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from seqlab.errors import DataError
from seqlab.parallel.groups import Costs

Row = tuple[int, ...]  # indices of the documents that lie in it, in order


class Turn(NamedTuple):
    """Rows that are worked on at once, each by `devices` devices."""

    devices: int
    rows: tuple[Row, ...]


class Turns(NamedTuple):
    """All turns of a batch.

    seconds         predicted, of all turns
    static_seconds  predicted if all rows were shared by `static_devices`, the best such number
    """

    turns: tuple[Turn, ...]
    seconds: float
    static_seconds: float
    static_devices: int

    @property
    def speedup(self) -> float:
        return self.static_seconds / self.seconds

    def __str__(self) -> str:
        sizes = sorted({turn.devices for turn in self.turns})
        each = [sum(turn.devices == size for turn in self.turns) for size in sizes]
        shown = ", ".join(f"{n} of {size}" for n, size in zip(each, sizes, strict=True))
        return (
            f"turns with rows on so many devices: {shown}; predicted to be "
            f"{self.speedup:.2f} times as fast as all on {self.static_devices}."
        )


def plan(
    lengths: Sequence[int] | np.ndarray,
    share: int,
    data: int,
    seq: int,
    costs: Costs,
    gap: float = 1e-3,
) -> Turns:
    """In which turn and row each document goes.

    lengths   tokens of each document, the last of which is only predicted
    share     tokens of a row that a device holds
    data, seq the mesh: on `seq` devices a row has seq * share tokens, and `data` rows make a turn;
              on half as many devices rows are half as long and twice as many. A power of two
    gap       how far, relatively, the numbers of turns may be from the best

    The same arguments give the same turns on every machine. Raises DataError for a document that
    is longer than a row of all `seq` devices.
    """
    sizes, pieces = [2**i for i in range(seq.bit_length())], np.asarray(lengths, int)
    if not len(pieces):
        return Turns((), 1.0, 1.0, 1)
    room, rows = np.array([s * share + 1 for s in sizes]), [data * seq // s for s in sizes]
    if pieces.max() > room[-1]:
        raise DataError(
            f"A document has {pieces.max()} tokens but a row of {seq} devices holds {room[-1]}: "
            "raise data.length."
        )
    seconds = costs.start + costs.seconds(np.array(sizes) * share, sizes)  # a padded row takes all

    def laid(counts) -> tuple[float, tuple[Turn, ...]]:
        turns = _filled(pieces, sizes, room, rows, counts)
        return sum(seconds[sizes.index(turn.devices)] for turn in turns), turns

    alone = [laid(only) for only in np.eye(len(sizes))[room >= pieces.max()]]
    static = min(alone, key=lambda found: found[0])
    mixed = laid(_counts(pieces, room, rows, seconds, gap))
    best = min(static, mixed, key=lambda found: found[0])
    return Turns(best[1], best[0], static[0], static[1][0].devices)


def _counts(lengths, room, rows, seconds, gap) -> np.ndarray:
    """How many turns of each size take least time and have room for all documents.

    n[s] turns, whole; x[k, s] documents of length k, in fractions, that go to size s. A document of
    more than half a row has a row of its own.
    """
    values, counts = np.unique(lengths, return_counts=True)
    K, S = len(values), len(room)
    of_each = np.tile(np.eye(S), K)  # [S, K S] sums x over lengths
    tokens = of_each * np.repeat(values, S)
    large = of_each * (values[:, None] * 2 > room[None]).ravel()
    fits = (values[:, None] <= room[None]).ravel()
    each = np.kron(np.eye(K), np.ones(S))
    solution = milp(
        np.r_[np.zeros(K * S), seconds],
        constraints=[
            LinearConstraint(np.hstack([each, np.zeros((K, S))]), counts, counts),  # pyright: ignore
            LinearConstraint(np.hstack([tokens, -np.diag(rows * room)]), -np.inf, 0),
            LinearConstraint(np.hstack([large, -np.diag(rows)]), -np.inf, 0),
        ],
        integrality=np.r_[np.zeros(K * S), np.ones(S)],
        bounds=Bounds(0, np.r_[np.where(fits, np.repeat(counts, S), 0), np.full(S, np.inf)]),
        options={"mip_rel_gap": gap},
    )
    return np.rint(solution.x[K * S :])


def _filled(lengths, sizes, room, rows, counts) -> tuple[Turn, ...]:
    """Turns of the sizes that `counts` asks for: the longest documents first, each in the shortest
    row that has room; where none has, another turn of the shortest such row is opened."""
    held = [np.zeros(int(n) * r, int) for n, r in zip(counts, rows, strict=True)]
    members: list[list[list[int]]] = [[[] for _ in h] for h in held]
    asked = [s for s, n in enumerate(counts) if n]
    for index in np.argsort(-lengths, kind="stable").tolist():
        able = [s for s in asked if room[s] >= lengths[index]] or [len(sizes) - 1]
        s = next((s for s in able if (held[s] + lengths[index] <= room[s]).any()), able[0])
        if not (held[s] + lengths[index] <= room[s]).any():
            held[s] = np.append(held[s], np.zeros(rows[s], int))
            members[s] += [[] for _ in range(rows[s])]
        row = int(np.argmax(held[s] + lengths[index] <= room[s]))
        held[s][row] += lengths[index]
        members[s][row].append(index)
    return tuple(
        Turn(sizes[s], tuple(map(tuple, members[s][at : at + rows[s]])))
        for s in range(len(sizes))
        for at in range(0, len(members[s]), rows[s])
        if any(members[s][at : at + rows[s]])
    )
