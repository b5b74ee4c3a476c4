"""What layers have to say to training beside their output: losses to be added, numbers to be seen.

A layer calls `add`; who wants to know runs the model within `collect`. Everything is passed on
while tracing, so what was added inside a transformed function must leave it as one of its results:
a function that scans or recomputes layers wraps them in `collect_inside` and hands what it found to
`include`. Where nobody collects nothing is computed.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels.precision import widen


class Total(NamedTuple):
    """Sums over the layers that added something under one name."""

    loss: jax.Array  # of scale * value
    value: jax.Array
    layers: jax.Array

    def mean(self) -> "Total":
        """The averages over layers."""
        return Total(self.loss / self.layers, self.value / self.layers, jnp.ones_like(self.layers))


class _Collector(NamedTuple):
    found: dict[str, Total]
    counts: jax.Array | None  # [B, T]


_collector: contextvars.ContextVar[_Collector | None] = contextvars.ContextVar(
    "auxiliary", default=None
)


@contextlib.contextmanager
def _collecting(collector: _Collector | None) -> Iterator[dict[str, Total]]:
    token = _collector.set(collector)
    try:
        yield collector.found if collector else {}
    finally:
        _collector.reset(token)


@contextlib.contextmanager
def collect() -> Iterator[dict[str, Total]]:
    """Everything that layers add in here, by name."""
    with _collecting(_Collector({}, None)) as found:
        yield found


@contextlib.contextmanager
def counting(counts: jax.Array) -> Iterator[None]:
    """In here tokens where `counts` [B, T] is false, such as padding, are left out of averages."""
    outside = _collector.get()
    with _collecting(outside and outside._replace(counts=counts)):
        yield


@contextlib.contextmanager
def collect_inside() -> Iterator[dict[str, Total]]:
    """Within a function that JAX transforms: what layers add in here, if anybody collects outside;
    it is to be returned, and given to `include` outside."""
    outside = _collector.get()
    with _collecting(outside and outside._replace(found={})) as found:
        yield found


def include(found: dict[str, Total]) -> None:
    """Pass on what `collect_inside` found; leading axes (of a scan) are summed."""
    collector = _collector.get()
    if collector is None:
        return
    for name, total in found.items():
        here = collector.found.get(name, Total(*(jnp.zeros(()),) * 3))
        collector.found[name] = jax.tree.map(lambda a, b: a + jnp.sum(b), here, total)


def add(name: str, value: jax.Array, scale: float) -> None:
    """A scalar to be seen as `name`, averaged over layers, and added to the loss times `scale`."""
    include({name: Total(scale * value, value, jnp.ones(()))})


def load_balance(scores: jax.Array, chosen: jax.Array, scale: float) -> None:
    """Add E sum_e f_e P_e, which is k at perfect balance (Switch Transformer, Fedus et al., 2022).

    scores [B, T, E] sum to one for each token, chosen [B, T, k] are its experts. P_e is the mean
    score, f_e how many times a token chose e on average, both over all tokens of the batch; only
    the scores get a gradient.
    """
    collector = _collector.get()
    if collector is None:
        return
    experts = scores.shape[-1]
    counts = jnp.ones(scores.shape[:2]) if collector.counts is None else collector.counts
    mean = lambda a: jnp.einsum("bt,bte->e", counts, a) / jnp.maximum(jnp.sum(counts), 1)
    f = mean(jnp.sum(jax.nn.one_hot(chosen, experts, dtype=scores.dtype), 2))
    add("load_balance", experts * jnp.sum(f * mean(widen(scores))), scale)
