"""Mixture of experts: a channel mixer of which every token uses a few parts (Shazeer et al., 2017).

Routers as in Mixtral (Jiang et al., 2024), Qwen, Granite and Jamba, softmax over experts, and as in
DeepSeek-V3 (2024), sigmoids whose ranking a correction shifts, within the best groups of experts.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.experts import route
from seqlab.kernels.precision import widen
from seqlab.layers import auxiliary, ffn
from seqlab.layers.ffn import ACTIVATIONS, Activation
from seqlab.layers.linear import Linear
from seqlab.settings import STRICT, NonNegativeFinite, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`experts` perceptrons of inner width `width`, of which each token uses `top_k`.

    A token weighs its experts by their scores, `normalize`d to sum to one, times `scale`. With
    `correction`, a learned number per expert is added where experts are ranked, not where they are
    weighed. With `groups`, only the `top_groups` groups whose two best experts score highest are
    eligible. `latent` is the width that routed experts work in, if not d_model. `shared` is a
    perceptron for every token beside them, `shared_gate` a sigmoid of x that multiplies it.

    With `aux_scale` above 0, training adds that times the load-balance loss of the scores (see
    `layers.auxiliary`), divided by their sum if they are sigmoids.

    `implementation` is one of `kernels.experts`.
    """

    experts: PositiveInt = 4
    top_k: PositiveInt = 2
    width: PositiveInt = 32
    activation: Activation = "silu"
    gated: bool = True
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: PositiveFinite = 1.0
    correction: bool = False
    groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    latent: PositiveInt | None = None
    latent_bias: bool = False
    shared: ffn.Config | None = None
    shared_gate: bool = False
    aux_scale: NonNegativeFinite = 0.0
    implementation: str | None = None

    def __post_init__(self):
        if self.groups > 1 and (self.experts % self.groups or self.experts < 2 * self.groups):
            raise ConfigError(
                f"moe: {self.experts} experts do not divide into {self.groups} groups of two or "
                "more."
            )
        if self.top_groups > self.groups:
            raise ConfigError(f"moe: top_groups={self.top_groups} of {self.groups} groups.")
        if self.top_k > self.experts // self.groups * self.top_groups:
            raise ConfigError(f"moe: top_k={self.top_k} is more than the experts eligible.")
        if self.shared_gate and self.shared is None:
            raise ConfigError("moe: shared_gate needs a shared perceptron: set shared.")

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MoE":
        return MoE(self, d_model, rngs=rngs)


class MoE(nnx.Module):
    """y = sum_{e in top k} g_e expert_e(x) (+ shared(x)), for x [B, T, D]; no state, no token is
    dropped.

    The router works in float32. The correction has no gradient, so that without a load-balance
    loss nothing keeps a balance between experts: routing that was learnt elsewhere can be tuned
    further, but a large mixture trained from the start may leave experts idle.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        E, D = c.experts, c.latent or d_model
        self.router = Linear(d_model, E, ("embed", None), rngs=rngs)
        self.correction = (
            nnx.Param(jnp.zeros(E, jnp.float32), axes=(None,)) if c.correction else None
        )
        latent = lambda *shape: Linear(*shape, bias=c.latent_bias, rngs=rngs) if c.latent else None
        self.latent_down = latent(d_model, D, ("embed", None))
        self.gate = _stack(E, D, c.width, ("embed", "ffn"), rngs) if c.gated else None
        self.up = _stack(E, D, c.width, ("embed", "ffn"), rngs)
        self.down = _stack(E, c.width, D, ("ffn", "embed"), rngs)
        self.latent_up = latent(D, d_model, (None, "embed"))
        self.shared = c.shared.build(d_model, rngs=rngs) if c.shared else None
        self.shared_gate = Linear(d_model, 1, ("embed", None), rngs=rngs) if c.shared_gate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)
        weights = tuple(w[...].astype(x.dtype) for w in weights)
        chosen, share = self.choose(x)
        inner = x if self.latent_down is None else self.latent_down(x)
        how = self.config.implementation
        y = route(self._expert, weights, inner, chosen, share, implementation=how)
        y = y if self.latent_up is None else self.latent_up(y)
        if self.shared is None:
            return y
        gate = 1 if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x))
        return y + gate * self.shared(x)

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token [B, T, k], best first, the lower number first among equals;
        and their weights [B, T, k] float32."""
        c, logits = self.config, self.router(widen(x))
        scores = jax.nn.softmax(logits) if c.score == "softmax" else jax.nn.sigmoid(logits)
        ranked = scores if self.correction is None else scores + self.correction[...]
        _, chosen = jax.lax.top_k(self._eligible(ranked), c.top_k)
        if c.aux_scale:
            of_all = scores / (jnp.sum(scores, -1, keepdims=True) + 1e-20)
            auxiliary.load_balance(of_all, chosen, c.aux_scale)
        share = jnp.take_along_axis(scores, chosen, -1)
        if c.normalize:
            share /= jnp.sum(share, -1, keepdims=True) + 1e-20  # sigmoids may all be zero
        return chosen, share * c.scale

    def _eligible(self, ranked: jax.Array) -> jax.Array:
        """Scores [..., E], -inf outside the best groups."""
        c = self.config
        if c.groups == 1:
            return ranked
        grouped = ranked.reshape(*ranked.shape[:-1], c.groups, -1)
        of_group = jnp.sum(jax.lax.top_k(grouped, 2)[0], -1)
        _, best = jax.lax.top_k(of_group, c.top_groups)
        among = jnp.any(jax.nn.one_hot(best, c.groups, dtype=bool), -2)[..., None]
        return jnp.where(among, grouped, -jnp.inf).reshape(ranked.shape)

    def _expert(self, multiply, weights, x: jax.Array) -> jax.Array:
        act, h = ACTIVATIONS[self.config.activation], multiply(x, weights[0])
        h = act(h) if self.gate is None else act(multiply(x, weights[2])) * h
        return multiply(h, weights[1])


def _stack(experts: int, d_in: int, d_out: int, axes: tuple[str, str], rngs: nnx.Rngs) -> nnx.Param:
    """The matrices [E, d_in, d_out] of all experts, each as `Linear` starts its own."""
    weight = jax.random.normal(rngs.params(), (experts, d_in, d_out), jnp.float32)
    return nnx.Param(weight * d_in**-0.5, axes=(None, *axes))
