"""Matrices of -1, 0 and 1 in few bits: two a number to compute with, 1.6 a number in files."""

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.errors import ModelError

PER_BYTE = 4
BLOCKS = (512, 256, 128)  # what suits the tiles of a TPU
FIVE = 5  # trits in a byte, as 3 ** 5 = 243
POWERS = 3 ** np.arange(FIVE)[::-1, None]  # of the first trit to the last


def rows(K: int) -> int:
    """How many rows K inputs are packed in."""
    return -(-K // PER_BYTE)


def block(R: int) -> int:
    """How many of R packed rows make a block: of 512, 256 or 128 inputs where that divides them,
    else all."""
    return next((b // PER_BYTE for b in BLOCKS if R * PER_BYTE % b == 0), R)


@jax.jit
def pack(trits: jax.Array) -> jax.Array:
    """[..., K, N] of -1, 0 and 1 -> [..., K / 4, N] uint8, the first rounded up.

    Row r of a block of b rows holds the inputs r, b + r, 2b + r and 3b + r of the block in bits
    0-1, 2-3, 4-5 and 6-7, each plus one: unpacked by a shift and a mask, they are four stretches of
    neighbours. Inputs that do not exist count as zeros.

    Raises ModelError for what is no matrix, or has no numbers.
    """
    if trits.ndim < 2 or 0 in trits.shape:
        raise ModelError(f"Weights of shape {list(trits.shape)} cannot be packed: give matrices.")
    *lead, K, N = trits.shape
    short = [(0, 0)] * len(lead) + [(0, -K % PER_BYTE), (0, 0)]
    codes = (jnp.pad(trits.astype(jnp.int8), short) + 1).astype(jnp.uint8)
    codes = codes.reshape(*lead, -1, PER_BYTE, block(rows(K)), N) << _shifts()
    return jnp.sum(codes, -3, dtype=jnp.uint8).reshape(*lead, -1, N)


def unpack(packed: jax.Array, K: int) -> jax.Array:
    """What `pack` packed, as int8 [..., K, N]."""
    *lead, R, N = packed.shape
    codes = packed.reshape(*lead, -1, 1, block(R), N) >> _shifts() & 3
    return (codes.astype(jnp.int8) - 1).reshape(*lead, -1, N)[..., :K, :]


def squeeze(trits: np.ndarray) -> np.ndarray:
    """[..., K, N] of -1, 0 and 1 -> [..., K / 5, N] uint8, the first rounded up: the form of files.

    A byte is ceil(256 v / 243), where v = sum_j (t_j + 1) 3^(4 - j) < 243 is of five inputs in a
    row: the next digit of v is the byte times three, divided by 256 and rounded down, and what that
    leaves is a byte again (llama.cpp's TQ1_0 has the same digits).
    """
    *lead, K, N = trits.shape
    short = [(0, 0)] * len(lead) + [(0, -K % FIVE), (0, 0)]
    digits = np.pad(np.asarray(trits, np.int16) + 1, short).reshape(*lead, -1, FIVE, N)
    values = np.sum(digits * POWERS, -2)
    return (-(-256 * values // 243)).astype(np.uint8)


def unsqueeze(squeezed: np.ndarray, K: int) -> np.ndarray | None:
    """What `squeeze` made, as int8 [..., K, N]; None for bytes or a shape that it does not make."""
    *lead, R, N = squeezed.shape
    if R != -(-K // FIVE) or not np.isin(squeezed, squeeze(_every()[..., None])).all():
        return None
    digits, left = [], squeezed
    for _ in range(FIVE):
        tripled = left.astype(np.uint16) * 3
        digits.append(tripled >> 8)
        left = tripled & 255
    return (np.stack(digits, -2).astype(np.int8) - 1).reshape(*lead, -1, N)[..., :K, :]


def is_packed(packed: jax.Array) -> bool:
    """Whether `pack` can have made this: no pair of bits is 3."""
    return not bool(jnp.any(packed & packed >> 1 & 0b01010101))


def _every() -> np.ndarray:
    """All 243 rows of five trits."""
    return np.arange(3**FIVE)[:, None] // POWERS[:, 0] % 3 - 1


def _shifts() -> jax.Array:
    return jnp.arange(0, 8, 8 // PER_BYTE, dtype=jnp.uint8)[:, None, None]
