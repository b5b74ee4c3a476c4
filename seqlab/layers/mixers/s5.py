"""S5 (Smith et al., 2023): a time-invariant complex state space, started as HiPPO's.

With resets as in Lu et al., 2023, for reinforcement learning: they are the contract's.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.kernels.linear_scan import Complex, linear_scan
from seqlab.kernels.precision import widen
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.settings import STRICT, PositiveFinite


@dataclass(frozen=True, config=STRICT)
class Config:
    """`d_state` real dimensions, that is half as many complex states, in HiPPO blocks.

    activation  after the state space, of its output s: "full_glu" (gelu(s) W_1) * sigmoid(gelu(s)
                W_2), "half_glu1" gelu(s) * sigmoid(gelu(s) W_2), "half_glu2" s * sigmoid(gelu(s)
                W_2), or "gelu"
    """

    d_state: PositiveInt = 32
    blocks: PositiveInt = 1
    dt_min: PositiveFinite = 1e-3  # at the start, dt is log-uniform between these two
    dt_max: PositiveFinite = 0.1
    activation: Literal["full_glu", "half_glu1", "half_glu2", "gelu"] = "full_glu"
    clip_eigenvalues: bool = False  # keeps the real parts below -1e-4, so that states decay
    implementation: str | None = None

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "S5":
        if self.d_state % (2 * self.blocks):
            raise ConfigError(
                f"s5: d_state = {self.d_state} does not divide into {self.blocks} blocks of an "
                "even size."
            )
        return S5(self, d_model, rngs=rngs)


class State(NamedTuple):
    h: Complex  # [B, P] of floats each, P = d_state / 2


class S5(Mixer):
    """h_t = e^(Lambda dt) h_{t-1} + (e^(Lambda dt) - 1) / Lambda (B x_t)

    s_t = 2 Re(C h_t) + D x_t;  y = activation(s). Of each conjugate pair of states one is kept,
    hence 2 Re.
    """

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        c, d = config, d_model
        self.config = c
        eigenvalues, basis = hippo(c.d_state // c.blocks)
        P, block = c.d_state // 2, len(eigenvalues)
        repeated = lambda part: jnp.asarray(np.tile(part, c.blocks), jnp.float32)
        self.real = nnx.Param(repeated(np.real(eigenvalues)), axes=("heads",))
        self.imag = nnx.Param(repeated(np.imag(eigenvalues)), axes=("heads",))
        log_dt = (math.log(c.dt_min), math.log(c.dt_max))
        log_dt = jax.random.uniform(rngs.params(), (P,), jnp.float32, *log_dt)
        self.log_dt = nnx.Param(log_dt, axes=("heads",))
        normal = lambda *shape: jax.random.normal(rngs.params(), shape, jnp.float32)
        real_b = normal(c.blocks, 2 * block, d) * d**-0.5
        v_re, v_im = np.real(basis), np.imag(basis)
        into = lambda part: jnp.einsum("np,jnd->djp", part, real_b).reshape(d, P)
        axes = ("embed", "heads")
        self.b_real = nnx.Param(into(v_re), axes=axes, decay=False)
        self.b_imag = nnx.Param(into(-v_im), axes=axes, decay=False)
        # C V, with C complex normal
        re, im = normal(2, d, c.blocks, 2 * block) * c.d_state**-0.5
        outof = lambda a, part: jnp.einsum("djn,np->jpd", a, part).reshape(P, d)
        self.c_real = nnx.Param(outof(re, v_re) - outof(im, v_im), axes=axes[::-1])
        self.c_imag = nnx.Param(outof(re, v_im) + outof(im, v_re), axes=axes[::-1])
        self.D = nnx.Param(normal(d), axes=("embed",))
        glu = lambda on: Linear(d, d, ("embed", "heads"), bias=True, rngs=rngs) if on else None
        self.value = glu(c.activation == "full_glu")
        self.gate = glu(c.activation != "gelu")

    def init_state(self, batch: int) -> State:
        P = self.config.d_state // 2
        return State(Complex(*jnp.zeros((2, batch, P), jnp.float32)))

    def mix(self, x, state: State, reset):
        decay, scale = self._discrete()
        into = Complex(self.b_real[...], self.b_imag[...]) * scale
        u = Complex(*(widen(x @ part.astype(x.dtype)) for part in into))
        decay = jax.tree.map(lambda a: jnp.broadcast_to(a, u.real.shape), decay)
        h, last = linear_scan(decay, u, reset, state.h, implementation=self.config.implementation)
        read = lambda part, weight: part.astype(x.dtype) @ weight[...].astype(x.dtype)
        y = 2 * (read(h.real, self.c_real) - read(h.imag, self.c_imag))
        return self._activate(y + self.D[...].astype(x.dtype) * x), State(last)

    def _discrete(self) -> tuple[Complex, Complex]:
        """e^z and (e^z - 1) / Lambda, z = Lambda dt, [P] each."""
        real, imag, dt = self.real[...], self.imag[...], jnp.exp(self.log_dt[...])
        if self.config.clip_eigenvalues:
            real = jnp.minimum(real, -1e-4)
        x, y = real * dt, imag * dt
        size = jnp.exp(x)
        # e^z - 1 without a difference of nearly equal numbers
        minus_one = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.square(jnp.sin(y / 2))
        grown = Complex(minus_one, size * jnp.sin(y))
        norm = jnp.square(real) + jnp.square(imag)
        return Complex(size * jnp.cos(y), size * jnp.sin(y)), grown * Complex(
            real / norm, -imag / norm
        )

    def _activate(self, s):
        a = jax.nn.gelu(s)
        value = {"half_glu2": s}.get(self.config.activation, a)
        value = value if self.value is None else self.value(a)
        return value if self.gate is None else value * jax.nn.sigmoid(self.gate(a))


def hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [size / 2], one of every conjugate pair, and eigenvectors [size, size / 2] of the
    normal part of the HiPPO-LegS matrix (Gupta et al., 2022)."""
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    matrix = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    p = np.sqrt(n + 0.5)
    normal = matrix + np.outer(p, p)
    skew = normal - np.diag(np.diag(normal))
    imag, vectors = np.linalg.eigh(-1j * skew)
    real = np.full(size // 2, np.mean(np.diag(normal)))
    return real + 1j * imag[: size // 2], vectors[:, : size // 2]
