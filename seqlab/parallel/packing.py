"""Documents packed on one token axis that devices share: how far states must travel, how softmax
attention's work falls on the devices, and an order of the documents that evens it out."""

import numpy as np

from seqlab.errors import DataError

TRIALS, ROUNDS = 64, 4  # orders looked at together, and how often


def hops_needed(segment_ids: np.ndarray, shards: int) -> int:
    """How many devices back the documents in these rows begin at most: `hops` for `window`.

    segment_ids [..., T]: neighbours with the same id are one document; 0 is padding
    """
    ids = np.asarray(segment_ids)
    tokens = ids.shape[-1]
    if shards < 1 or tokens % shards:
        raise DataError(
            f"Rows of {tokens} tokens cannot be split over {shards} devices: take a length that "
            "mesh.seq divides."
        )
    place = np.arange(tokens)
    starts = np.diff(ids, axis=-1, prepend=ids[..., :1]) != 0
    began = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
    back = place // (tokens // shards) - began // (tokens // shards)
    return int(np.max(back, where=ids > 0, initial=0))


def most_hops(longest: int, tokens: int, shards: int) -> int:
    """The same for rows of so many tokens, wherever in them a document of `longest` may lie."""
    return min(shards - 1, -(-(longest - 1) // (tokens // shards)))


def work(lengths: np.ndarray, tokens: int, shards: int) -> np.ndarray:
    """[..., shards]: pairs of tokens that causal attention compares on each device.

    lengths [..., documents]: in order, from the beginning of a row of `tokens`
    """
    ends = np.cumsum(lengths, -1)
    borders = np.linspace(0, tokens, shards + 1)
    begun = np.clip(borders - (ends - lengths)[..., None], 0, lengths[..., None])
    return np.diff((begun * (begun + 1) / 2).sum(-2), axis=-1)


def balanced(lengths: np.ndarray, tokens: int, shards: int, seed: int = 0) -> np.ndarray:
    """An order of a row's documents by which the busiest device has little to do beyond the mean.

    The best of a few hundred orders, each round exchanging two documents of the best so far; the
    same arguments give the same order on every machine.
    """
    lengths = np.asarray(lengths)
    random = np.random.RandomState(seed)  # its stream is frozen, unlike that of newer generators
    best = np.arange(len(lengths))
    if shards == 1 or len(best) < 2:
        return best
    orders = np.stack([best, *(random.permutation(len(best)) for _ in range(TRIALS - 1))])
    for _ in range(ROUNDS):
        busiest = work(lengths[orders], tokens, shards).max(-1)
        best = orders[np.argmin(busiest)]
        orders = np.tile(best, (TRIALS, 1))
        trial, pair = np.arange(1, TRIALS), random.randint(len(best), size=(2, TRIALS - 1))
        orders[trial, pair[0]], orders[trial, pair[1]] = best[pair[1]], best[pair[0]]
    busiest = work(lengths[orders], tokens, shards).max(-1)
    return orders[np.argmin(busiest)]
