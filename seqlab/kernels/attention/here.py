"""Queries meet the keys that are on their device, and what they saw before is not forgotten: the
form of the platform that it is lowered for."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from seqlab.kernels.attention import xla
from seqlab.kernels.attention.pallas_tpu import OnTPU, suits
from seqlab.kernels.attention.visible import EMPTY
from seqlab.kernels.attention.xla import Answered, Gradients, Keys, Meeting, Options, Queries, Seen
from seqlab.kernels.precision import widen


def see(options: Options, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    """What the queries have seen, and these keys too."""
    in_xla = functools.partial(xla.see, options)
    if not suits(queries, keys):
        return in_xla(queries, keys, seen)
    on_tpu = functools.partial(see_on_tpu, OnTPU(options))
    return lax.platform_dependent(queries, keys, seen, default=in_xla, tpu=on_tpu)


def pull(options: Options, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    """The gradients, and what these keys add to those of the queries and get themselves."""
    in_xla = functools.partial(xla.pull, options)
    if not suits(done, keys):
        return in_xla(done, keys, gradients)
    on_tpu = functools.partial(pull_on_tpu, OnTPU(options))
    return lax.platform_dependent(done, keys, gradients, default=in_xla, tpu=on_tpu)


def see_on_tpu(form: OnTPU, queries: Queries, keys: Keys, seen: Seen) -> Seen:
    return joined(seen, *form.see(queries, keys, seen.y.dtype))


def pull_on_tpu(form: OnTPU, done: Answered, keys: Keys, gradients: Gradients) -> Gradients:
    return jax.tree.map(jnp.add, gradients, form.pull(done, keys))


def joined(seen: Seen, y, lse) -> Seen:
    """What queries have seen, and what they saw elsewhere: y with its log-sum-exp."""
    top = jnp.maximum(seen.top, lse)
    old, new = jnp.exp(seen.top - top), jnp.exp(lse - top)
    old, new = (jnp.where(n > EMPTY, w, 0) for n, w in ((seen.top, old), (lse, new)))
    return Seen(old[..., None] * seen.y + new[..., None] * widen(y), top, old * seen.total + new)


HERE = Meeting(see, pull)
