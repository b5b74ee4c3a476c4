"""Reading prompts: whole chunks wherever all rows have one, and what makes ragged rows exact."""

import numpy as np

from seqlab.infer.decode import Carry, Structure, read_chunk, read_steps

SMALLEST = 16  # a short prompt is read in a chunk of the next power of two from here on


def from_empty(
    structure: Structure,
    params,
    carry: Carry,
    rows: list[np.ndarray],
    chunk_size: int,
    prefix: int,
) -> Carry:
    """The carry after rows of any lengths, of which `carry` holds the empty state.

    Rows are padded on the left to whole chunks; the reset at a row's first token forgets the
    padding, exactly. Each token of padding is a document of its own and takes no room in a state.
    The first chunk is as long as it takes for the prefix of every row to lie in it, so with a
    prefix rows of like lengths take less memory.
    """
    lengths = np.array([row.size for row in rows])
    longest = int(lengths.max())
    size = min(chunk_size, max(SMALLEST, 1 << (longest - 1).bit_length()))
    width = -(-longest // size) * size
    tokens = np.stack([np.pad(row, (width - row.size, 0)) for row in rows])
    reset = np.arange(width) <= (width - lengths)[:, None]
    shortest = int(lengths.min())  # its prefix ends last
    first = first_chunk(prefix and width - shortest + min(prefix, shortest), size)
    ends = range(first, width + 1, size)
    for at, end in zip([0, *ends], ends, strict=False):
        part = slice(at, end)
        carry = _finished(read_chunk(structure, params, carry, tokens[:, part], reset[:, part]))
    return carry


def first_chunk(prefix: int, size: int) -> int:
    """Tokens read at once at the start: as many times `size` as it takes to hold the prefix."""
    return max(1, -(-prefix // size)) * size


def from_state(
    structure: Structure,
    params,
    carry: Carry,
    rows: list[np.ndarray],
    chunk_size: int,
    block: int,
) -> Carry:
    """The carry after more of each text: what the rows have in common in chunks, of an eighth of
    the size near the end, and their ragged ends token by token, `block` to a call."""
    lengths = [row.size for row in rows]
    at = 0
    for size in (chunk_size, max(1, chunk_size // 8)):
        while min(lengths) - at >= size:
            tokens = np.stack([row[at : at + size] for row in rows])
            none = np.zeros(tokens.shape, bool)
            carry = _finished(read_chunk(structure, params, carry, tokens, none))
            at += size
    for start in range(at, max(lengths), block):
        ends = [row[start : start + block] for row in rows]
        counts = np.array([end.size for end in ends], np.int32)
        tokens = np.stack([np.pad(end, (0, block - end.size)) for end in ends])
        carry = read_steps(structure, params, carry, tokens, counts)
    return carry


def _finished(carry: Carry) -> Carry:
    """Waits: a queue of chunks in flight would hold a long prompt in memory."""
    carry.logits.block_until_ready()
    return carry
