"""The scan under one gradient, whichever form of it a platform takes (see `kernels.platforms`).

It keeps every h, which is a result anyway, and not b: nothing else is needed, and nothing computed
again.
"""

import functools
from typing import Any, Protocol

import jax

from seqlab.kernels.kept import kept
from seqlab.kernels.linear_scan.xla import InXLA, masked
from seqlab.kernels.platforms import Forms


class Form(Protocol):
    """Hashable; for a and b [B, T, ...], arrays or `Complex` of them, and a state [B, ...]."""

    def run(self, a, b, state) -> tuple[Any, Any]:
        """Every h [B, T, ...], and the last"""
        ...

    def backward(self, a, h, state, dh, d_last) -> tuple[Any, Any, Any]:
        """Cotangents of a, b and the state"""
        ...


IN_XLA: Any = InXLA()
ONE_FORM = Forms(IN_XLA)


def scanned(a, b, reset, state, forms: Forms = ONE_FORM):
    """The definition's arguments and results, by one of these forms."""
    h, last = scan(forms, *masked(a, b, reset), state)  # pyright: ignore
    return jax.tree.map(lambda h, b: h.astype(b.dtype), h, b), last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(forms: Forms, a, b, state):
    """h_t = a_t h_{t-1} + b_t [B, T, ...], and the last of them"""
    return forms.call("run", a, b, state)


def _forward(forms, a, b, state):
    h, last = kept(forms.call("run", a, b, state))
    return (h, last), (a, h, state)


def _backward(forms, saved, cotangents):
    return forms.call("backward", *saved, *cotangents)


scan.defvjp(_forward, _backward)
