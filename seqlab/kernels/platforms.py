"""A scan over chunks with a form for each platform, of which lowering takes one.

Gradients of `lax.platform_dependent` keep what every form keeps, on every platform. So here the
forms stand inside of one gradient: each keeps its tokens and the states that enter its chunks, and
what one kept the other could go on with.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax

from seqlab.kernels.kept import kept


class Form(Protocol):
    """Hashable. Behind the tokens [B, T, ...] there may be weights that they share; a cotangent of
    bool tokens is None."""

    def run(self, tokens: tuple, state) -> tuple[Any, Any]:
        """y and the state after the last token"""
        ...

    def keeping(self, tokens: tuple, state) -> tuple[tuple[Any, Any], Any]:
        """The same, and the states that enter the chunks [N, B, ...]"""
        ...

    def backward(self, tokens: tuple, entering, d_y, d_state) -> tuple[tuple, Any]:
        """Cotangents of the tokens and of the state"""
        ...


class Forms(NamedTuple):
    """`default` runs where there is none of a platform's own. All keep states alike: as `tpu` says,
    if it has a method `alike` that makes of a form one that does."""

    default: Any  # a `Form` where `scan` takes them, or anything else with methods to call
    tpu: Any = None
    gpu: Any = None  # of NVIDIA

    def call(self, method: str, *args):
        alike = getattr(self.tpu, "alike", lambda form: form)
        gpu = self.gpu and alike(self.gpu)
        default, own = getattr(alike(self.default), method), {"tpu": self.tpu, "cuda": gpu}
        forms = {name: getattr(form, method) for name, form in own.items() if form is not None}
        return lax.platform_dependent(*args, default=default, **forms) if forms else default(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(forms: Forms, tokens: tuple, state):
    """y and the state after the last of tokens [B, T, ...]."""
    return forms.call("run", tokens, state)


def _forward(forms, tokens, state):
    results, entering = kept(forms.call("keeping", tokens, state))
    return results, (tokens, entering)


def _backward(forms, saved, cotangents):
    return forms.call("backward", *saved, *cotangents)


scan.defvjp(_forward, _backward)
