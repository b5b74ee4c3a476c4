"""Kernel families as they are timed: arguments of a shape, and what it takes at the least."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.kernels import attention as softmax
from seqlab.kernels import ternary_matmul as ternary
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.recurrence import RECURRENCES
from seqlab.kernels.selective_scan import selective_scan
from seqlab.kernels.ternary_matmul.packing import pack
from seqlab.settings import STRICT

N = 16  # numbers of a selective scan's state for each channel


@dataclass(frozen=True, config=STRICT)
class Shape:
    """B rows of T tokens, H heads, keys K wide and values V wide. Kernels without heads have H V
    channels; a product takes B T rows of width H K to the width H V."""

    B: PositiveInt = 2
    T: PositiveInt = 1024
    H: PositiveInt = 4
    K: PositiveInt = 64
    V: PositiveInt = 128


class Case(NamedTuple):
    """One way in which a family is used: `call(*arrays, implementation=)`, of whose results the
    first is y; `arrays(draw, shape)` are its arguments, of which those at `learned` have gradients.
    """

    family: str
    variant: str
    call: Callable[..., Any]
    arrays: Callable[["Draw", Shape], tuple]
    learned: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.family}, {self.variant}" if self.variant else self.family


class Draw:
    """Random arrays: `tokens` in the dtype of operands, `wide` in float32."""

    def __init__(self, dtype: Any):
        self.dtype, self.key = dtype, jax.random.key(0)

    def wide(self, *shape: int) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return jax.random.normal(key, shape, jnp.float32)

    def tokens(self, *shape: int) -> jax.Array:
        return self.wide(*shape).astype(self.dtype)

    def keys(self, *shape: int) -> jax.Array:
        """Of length 1."""
        drawn = self.wide(*shape)
        return (drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)).astype(self.dtype)

    def decay(self, *shape: int) -> jax.Array:
        """Logarithms of decays near 0.95."""
        return jax.nn.log_sigmoid(self.wide(*shape) + 3)


def implementations(family: str) -> list[str]:
    """The names of a family's forms, the definition first."""
    forms = {
        "attention": softmax.NAMED,
        "ternary_matmul": ternary.IMPLEMENTATIONS,
    }
    return list(forms.get(family) or RECURRENCES[family].implementations)


def _reset(s: Shape) -> jax.Array:
    return jnp.zeros((s.B, s.T), bool)


def _outer(draw: Draw, s: Shape, channels: bool = False, normaliser: bool = False) -> tuple:
    q, k = (draw.keys(s.B, s.T, s.H, s.K) for _ in range(2))
    v, decay = draw.tokens(s.B, s.T, s.H, s.V), draw.decay(s.B, s.T, s.H, s.K if channels else 1)
    return q, k, v, decay, _reset(s), jnp.zeros((s.B, s.H, s.K, s.V + normaliser))


def _delta(draw: Draw, s: Shape, channels: bool = False) -> tuple:
    q, k, v, decay, reset, state = _outer(draw, s, channels)
    return q, k, v, jax.nn.sigmoid(draw.wide(s.B, s.T, s.H)), decay, reset, state


def _low_rank(draw: Draw, s: Shape) -> tuple:
    q, k, v, decay, reset, state = _outer(draw, s, channels=True)
    removed = draw.keys(s.B, s.T, s.H, s.K)
    return q, k, v, -removed, removed / 2, decay, reset, state


def _selective(draw: Draw, s: Shape) -> tuple:
    E = s.H * s.V
    u, dt = draw.tokens(s.B, s.T, E), jax.nn.softplus(draw.wide(s.B, s.T, E) - 4)
    b, c = (draw.tokens(s.B, s.T, 1, N) for _ in range(2))
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N))
    return u, dt, b, c, _reset(s), A, jnp.zeros((s.B, E, N))


def _linear(draw: Draw, s: Shape) -> tuple:
    E = s.H * s.V
    return (
        jnp.exp(draw.decay(s.B, s.T, E)),
        draw.tokens(s.B, s.T, E),
        _reset(s),
        jnp.zeros((s.B, E)),
    )


def _rnn(draw: Draw, s: Shape) -> tuple:
    d = s.V
    R = (draw.wide(s.H, d, 4, d) * d**-0.5).astype(draw.dtype)
    state = tuple(jnp.zeros((s.B, s.H, d)) for _ in range(4))
    return draw.tokens(s.B, s.T, s.H, 4, d), _reset(s), R, draw.wide(s.H, 4, d), state


def _softmax(draw: Draw, s: Shape) -> tuple:
    q, k = (draw.tokens(s.B, s.T, s.H, s.K) for _ in range(2))
    place = jnp.broadcast_to(jnp.arange(s.T), (s.B, s.T))
    at = place, jnp.zeros_like(place)
    return q, k, draw.tokens(s.B, s.T, s.H, s.V), *at, *at


def _ternary(draw: Draw, s: Shape) -> tuple:
    x = jnp.clip(jnp.round(32 * draw.wide(s.B * s.T, s.H * s.K)), -127, 127).astype(jnp.int8)
    trits = jnp.clip(jnp.round(draw.wide(s.H * s.K, s.H * s.V)), -1, 1)
    return x, pack(trits.astype(jnp.int8))


_sums = functools.partial(decayed_outer_product, normaliser=True)
CASES = (
    Case("decayed_outer_product", "one decay a head", decayed_outer_product, _outer, (0, 1, 2, 3)),
    Case(
        "decayed_outer_product",
        "one decay a channel",
        decayed_outer_product,
        functools.partial(_outer, channels=True),
        (0, 1, 2, 3),
    ),
    Case(
        "decayed_outer_product",
        "one decay a head, normaliser",
        _sums,
        functools.partial(_outer, normaliser=True),
        (0, 1, 2, 3),
    ),
    Case("delta_rule", "one decay a head", delta_rule, _delta, (0, 1, 2, 3, 4)),
    Case(
        "delta_rule",
        "one decay a channel",
        delta_rule,
        functools.partial(_delta, channels=True),
        (0, 1, 2, 3, 4),
    ),
    Case("diagonal_plus_low_rank", "", diagonal_plus_low_rank, _low_rank, (0, 1, 2, 3, 4, 5)),
    Case("selective_scan", f"{N} states a channel", selective_scan, _selective, (0, 1, 2, 3, 5)),
    Case("linear_scan", "real", linear_scan, _linear, (0, 1)),
    Case("fused_rnn", "sLSTM", functools.partial(fused_rnn, cell=cells.slstm), _rnn, (0, 2, 3)),
    Case("attention", "causal", softmax.attention, _softmax, (0, 1, 2)),
    Case("ternary_matmul", "", ternary.ternary_matmul, _ternary, ()),
)
FAMILIES = tuple(dict.fromkeys(case.family for case in CASES))
