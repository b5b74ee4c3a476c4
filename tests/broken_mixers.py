"""A healthy mixer in plain JAX, and one for each way to break it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from pydantic.dataclasses import dataclass

from seqlab.kernels.precision import widen
from seqlab.layers.mixer import Mixer
from seqlab.parallel.mesh import SEQ

TAPS = 3


class State(NamedTuple):
    inputs: jax.Array  # [B, TAPS - 1, D]
    memory: jax.Array  # [B, D] float32
    tokens: jax.Array  # [B] int32, of the current document


class Healthy(Mixer):
    """A short convolution, then h = a h + (1 - a) u with a gate, all written out."""

    def __init__(self, config, d_model: int, rngs: nnx.Rngs):
        weight = lambda *shape: nnx.Param(0.2 * jax.random.normal(rngs.params(), shape))
        self.config = config
        self.taps = weight(TAPS, d_model)
        self.forget = weight(d_model, d_model)
        self.out = weight(d_model, d_model)

    def init_state(self, batch: int) -> State:
        d = self.out.shape[0]
        inputs, memory = jnp.zeros((batch, TAPS - 1, d)), jnp.zeros((batch, d))
        return State(inputs, memory, jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        u, inputs = self.conv(x, state.inputs, reset)
        decay = jax.nn.sigmoid(widen(u @ self.forget[...].astype(x.dtype)))
        h, memory = self.scan(decay, widen(u), reset, state.memory)
        y = h.astype(x.dtype) @ self.out[...].astype(x.dtype)
        tokens = self.scan_tokens(reset, state.tokens)
        return y, State(inputs.astype(state.inputs.dtype), memory, tokens)

    def conv(self, x, inputs, reset):
        past = jnp.concatenate([inputs.astype(x.dtype), x], 1)
        document = jnp.pad(jnp.cumsum(reset, 1), [(0, 0), (TAPS - 1, 0)])
        windows = lambda a: jnp.stack([a[:, i : i + x.shape[1]] for i in range(TAPS)], 2)
        mine = windows(document) == document[:, TAPS - 1 :, None]  # [B, T, TAPS]
        read = jnp.where(mine[..., None], windows(past), 0)
        left = document[:, x.shape[1] :] == document[:, -1:]
        kept = jnp.where(left[..., None], past[:, x.shape[1] :], 0)
        return jnp.einsum("btwd,wd->btd", read, self.taps[...].astype(x.dtype)), kept

    def scan(self, decay, u, reset, memory):
        def step(h, token):
            a, u, start = token
            h = a * jnp.where(start[:, None], 0, h) + (1 - a) * u
            return h, h

        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (decay, u, reset))
        memory, h = lax.scan(step, memory, tokens)
        return jnp.moveaxis(h, 0, 1), memory

    def scan_tokens(self, reset, tokens):
        since = jnp.where(reset, jnp.arange(reset.shape[1]), -1).max(1)
        T = reset.shape[1]
        return jnp.where(since < 0, tokens + T, T - since).astype(tokens.dtype)


class SeesTheFuture(Healthy):
    def mix(self, x, state, reset):
        return super().mix(x + 0.01 * jnp.roll(x, -1, 1), state, reset)


class IgnoresResets(Healthy):
    def scan(self, decay, u, reset, memory):
        return super().scan(decay, u, jnp.zeros_like(reset), memory)


class IgnoresTheFirstReset(Healthy):
    """Resets count, but not at the first token of a piece."""

    def scan(self, decay, u, reset, memory):
        return super().scan(decay, u, reset.at[:, 0].set(False), memory)


class GrowsItsState(Healthy):
    def mix(self, x, state, reset):
        y, after = super().mix(x, state, reset)
        return y, after._replace(inputs=jnp.concatenate([state.inputs, x], 1))


class ConvLeaks(Healthy):
    def conv(self, x, inputs, reset):
        return super().conv(x, inputs, jnp.zeros_like(reset))


class ConvStateLeaks(Healthy):
    def conv(self, x, inputs, reset):
        u, _ = super().conv(x, inputs, reset)
        return u, super().conv(x, inputs, jnp.zeros_like(reset))[1]


class DropsItsConvState(Healthy):
    def conv(self, x, inputs, reset):
        return super().conv(x, jnp.zeros_like(inputs), reset)


class MixesRows(Healthy):
    def mix(self, x, state, reset):
        return super().mix(x - 0.01 * x.mean(0), state, reset)


class KeepsBfloat16(Healthy):
    def init_state(self, batch):
        empty = super().init_state(batch)
        return empty._replace(memory=empty.memory.astype(jnp.bfloat16))

    def mix(self, x, state, reset):
        y, after = super().mix(x, state._replace(memory=widen(state.memory)), reset)
        return y, after._replace(memory=after.memory.astype(state.memory.dtype))


class FollowsTheInputsDtype(Healthy):
    def mix(self, x, state, reset):
        y, after = super().mix(x, state, reset)
        return y, after._replace(memory=after.memory.astype(x.dtype))


class RoundsItsState(Healthy):
    def mix(self, x, state, reset):
        y, after = super().mix(x, state, reset)
        rounded = after.memory.astype(jnp.bfloat16).astype(after.memory.dtype)
        return y, after._replace(memory=rounded)


class WidensBfloat16(Healthy):
    def mix(self, x, state, reset):
        y, after = super().mix(x, state, reset)
        return widen(y), after


class WrongGradient(Healthy):
    """A backward pass by hand, for many tokens, that forgets 1% of the decay's gradient."""

    def scan(self, decay, u, reset, memory):
        forward = jax.custom_vjp(super().scan)

        def backward(residuals, cotangents):
            _, vjp = jax.vjp(
                lambda a, u, m: super(WrongGradient, self).scan(a, u, reset, m), *residuals
            )
            decay, *others = vjp(cotangents)
            return 0.99 * decay, others[0], None, others[1]

        forward.defvjp(
            lambda *a: (super(WrongGradient, self).scan(*a), (a[0], a[1], a[3])), backward
        )
        return (super().scan if decay.shape[1] == 1 else forward)(decay, u, reset, memory)


class Overflows(Healthy):
    def mix(self, x, state, reset):
        return super().mix(jnp.log(1 + jnp.exp(5 * x)), state, reset)


class HasADeadParameter(Healthy):
    def __init__(self, config, d_model, rngs):
        super().__init__(config, d_model, rngs)
        self.unused = nnx.Param(jnp.ones(d_model))


class StopsAGradient(Healthy):
    def scan(self, decay, u, reset, memory):
        return super().scan(lax.stop_gradient(decay), u, reset, memory)


class Retraces(Healthy):
    """Its states differ in type from the empty one, so that every first step compiles twice."""

    def init_state(self, batch):
        return (
            super()
            .init_state(batch)
            ._replace(tokens=jnp.broadcast_to(jnp.asarray(0), (batch,)) * 1)
        )

    def mix(self, x, state, reset):
        y, after = super().mix(x, state, reset)
        return y, after._replace(tokens=after.tokens.astype(jnp.uint32))


class ShardsForgetTheState(Healthy):
    """By hand on a mesh, but no state travels from one shard to the next."""

    def scan(self, decay, u, reset, memory):
        if jax.sharding.get_abstract_mesh().empty:
            return super().scan(decay, u, reset, memory)
        time, row = P(None, SEQ), P()

        def shard(decay, u, reset, memory):
            mine = lax.pcast(memory, SEQ, to="varying")
            h, after = super(ShardsForgetTheState, self).scan(decay, u, reset, mine)
            last = lax.axis_index(SEQ) == lax.axis_size(SEQ) - 1
            return h, lax.psum(jnp.where(last, after, 0), SEQ)

        specs = {"in_specs": (time, time, time, row), "out_specs": (time, row)}
        return jax.shard_map(shard, **specs)(decay, u, reset, memory)


class Raises(Healthy):
    def conv(self, x, inputs, reset):
        raise ValueError("the kernel said no\nwith a long second line")


@dataclass(frozen=True)
class Config:
    kind: str = "Healthy"

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return globals()[self.kind](self, d_model, rngs=rngs)
