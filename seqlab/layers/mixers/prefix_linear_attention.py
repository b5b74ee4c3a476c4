"""Prefix linear attention (Just Read Twice, Arora et al., 2024): every token of a document reads
its first `prefix_len` tokens, those to come too, before what was read is forgotten."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError, ModelError
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.precision import widen
from seqlab.layers import feature_maps
from seqlab.layers.linear import Linear, heads, merge
from seqlab.layers.mixer import Mixer
from seqlab.layers.rope import positions
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`key_dim` is the width of a head's queries and keys before the feature map; that of its
    values is d_model * expand / heads."""

    prefix_len: PositiveInt = 4
    heads: PositiveInt = 4
    key_dim: PositiveInt = 4
    expand: PositiveFinite = 1.0
    feature_map: feature_maps.Config = feature_maps.Config(kind="taylor")
    eps: PositiveFinite = 1e-6  # added to the normaliser
    chunk_size: PositiveInt = 64
    implementation: str | None = None

    def __post_init__(self):
        if self.feature_map.kind in feature_maps.SIGNED:
            raise ConfigError(
                "prefix_linear_attention: scores under the feature map "
                f"{self.feature_map.kind!r} may sum to zero: take a positive map."
            )

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "PrefixLinearAttention":
        width = int(d_model * self.expand)
        if width < 1 or width % self.heads:
            raise ConfigError(
                f"prefix_linear_attention: expand * d_model = {width} does not divide into "
                f"{self.heads} heads."
            )
        return PrefixLinearAttention(self, d_model, rngs=rngs)


class State(NamedTuple):
    memory: jax.Array  # [B, H, F, V + 1]; the last column is the normaliser
    position: jax.Array  # [B] int32, of the next token


class PrefixLinearAttention(Mixer):
    """S_i = sum_{j <= i} phi(k_j) v_j^T + sum_{j < prefix_len} phi(k'_j) v'_j^T
    z_i = sum_{j <= i} phi(k_j)       + sum_{j < prefix_len} phi(k'_j)

    y_i = W_out S_i^T phi(q_i) / (z_i . phi(q_i) + eps),  j over the tokens of i's own document

    Both sums are linear in the length, for packed documents too: what the prefix holds up to a
    token comes from a scan along time, the rest of it from a scan against time. Where a mesh splits
    time, states travel three times instead of once, and for the scan against it features and values
    cross over to the mirrored device and what they read comes back.

    A document that ends within its prefix, or whose call does, is read as far as it goes. A call
    that goes on inside a prefix raises ModelError where positions are known (not inside jax.jit);
    inside jax.jit that document's outputs are NaN, in later calls too.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c = self.config = config
        self.prefix, self.V = c.prefix_len, int(d_model * c.expand) // c.heads
        linear = lambda d: Linear(d_model, c.heads * d, ("embed", "heads"), rngs=rngs)
        self.q, self.k, self.v = linear(c.key_dim), linear(c.key_dim), linear(self.V)
        self.prefix_k, self.prefix_v = linear(c.key_dim), linear(self.V)
        self.map = c.feature_map.build(c.key_dim, c.heads, rngs=rngs)
        self.out = Linear(c.heads * self.V, d_model, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        memory = jnp.zeros((batch, self.config.heads, self.map.width, self.V + 1), jnp.float32)
        return State(memory, jnp.zeros(batch, jnp.int32))

    def mix(self, x, state: State, reset):
        c, position = self.config, positions(reset, state.position)
        begun = (state.position > 0) & (state.position < c.prefix_len)
        cut = begun[:, None] & (jnp.cumsum(reset, 1) == 0)
        _refuse(cut, state.position, c.prefix_len)
        q, k, prefix_k = (self.map(heads(f(x), c.heads)) for f in (self.q, self.k, self.prefix_k))
        v, prefix_v = (heads(f(x), c.heads) for f in (self.v, self.prefix_v))
        # features, not keys: those of a key of zeros are not zero
        prefix_k = jnp.where((position < c.prefix_len)[..., None, None], prefix_k, 0)
        none = jnp.zeros_like(state.memory)
        own, memory = self._read(q, k, v, reset, state.memory)
        before, prefix = self._read(q, prefix_k, prefix_v, reset, none)
        reads = [own, before]
        if x.shape[1] > 1:
            reads.append(self._read_after(q, prefix_k, prefix_v, reset, none))
        y, total = jax.tree.map(lambda *a: sum(a), *reads)
        y = (y / (total + c.eps)[..., None]).astype(x.dtype)
        y = jnp.where(cut[..., None], jnp.nan, self.out(merge(y)))
        end = jnp.where(cut[:, -1], state.position, position[:, -1] + 1)
        return y, State(memory + prefix, end)

    def _read_after(self, q, k, v, reset, memory):
        """What each query reads of the tokens after its own: of those that begin at the next."""
        last = jnp.roll(reset, -1, 1).at[:, -1].set(True)
        k, v = (jnp.where(last[..., None, None], 0, jnp.roll(a, -1, 1)) for a in (k, v))
        mirrored = (jnp.flip(a, 1) for a in (q, k, v, last))
        return jax.tree.map(lambda a: jnp.flip(a, 1), self._read(*mirrored, memory)[0])

    def _read(self, q, k, v, reset, memory):
        """((sum_{j <= i} q_i . k_j v_j, sum_{j <= i} q_i . k_j), memory)"""
        c, none = self.config, jnp.zeros((*q.shape[:3], 1), widen(q).dtype)
        options = {"chunk_size": c.chunk_size, "implementation": c.implementation}
        return decayed_outer_product(q, k, v, none, reset, memory, normaliser=True, **options)


def _refuse(cut: jax.Array, position: jax.Array, prefix_len: int) -> None:
    if not isinstance(cut, Tracer) and cut.any():
        raise ModelError(
            f"A document stands at token {int(position[cut.any(1)][0])} of a prefix of "
            f"{prefix_len} tokens, which must come in one call: give them all at once."
        )
