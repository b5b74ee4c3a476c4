"""Functions of other JAX packages beside the kernels that do the same here, on equal arguments.

Their packages are no requirement: `pip install --no-deps mlstm_kernels einops ejkernel jaxtyping
beartype`. A peer whose answer is not ours is not raced.
"""

import importlib
import importlib.util
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.selective_scan import selective_scan
from seqlab.layers import exponential_memory as mlstm

B, T, H, K, V = 2, 1024, 4, 64, 128
E, N = 1024, 16


class Peer(NamedTuple):
    """Two functions of the same arrays, which give the same y [B, T, ...]."""

    name: str
    package: str
    arrays: tuple
    ours: Callable
    theirs: Callable


def peers() -> list[Peer]:
    """Those whose package is here."""
    found = []
    for make in (_mlstm, _gla, _gated_delta_rule, _selective_scan):
        try:
            found.append(make())
        except ImportError as missing:
            print(f"{make.__name__.strip('_')} has no peer here: {missing}", flush=True)
    return found


def _normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


RESET = np.zeros((B, T), bool)


def _mlstm() -> Peer:
    chunkwise = _mlstm_kernels().mlstm_chunkwise
    heads_first = lambda a: jnp.swapaxes(a, 1, 2)

    def ours(q, k, v, i, f):
        forget, state = jax.nn.log_sigmoid(f), mlstm.empty(B, H, K, V)
        return mlstm.exponential_memory(q, k, v, i, forget, RESET, state, eps=1e-6)[0]

    def theirs(*tokens):
        return heads_first(chunkwise(*map(heads_first, tokens), chunk_size=64))

    arrays = _normal((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))
    return Peer("mlstm", "mlstm_kernels", (*arrays[:4], arrays[4] + 3), ours, theirs)


def _mlstm_kernels():
    """Its file for XLA alone: the package around it imports Triton, which wants a GPU."""
    package = importlib.util.find_spec("mlstm_kernels")
    if package is None or package.origin is None:
        raise ImportError("No module named 'mlstm_kernels'")
    file = pathlib.Path(package.origin).parent / "jax" / "chunkwise" / "native" / "fw.py"
    spec = importlib.util.spec_from_file_location("mlstm_kernels_native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _gla() -> Peer:
    gla = importlib.import_module("ejkernel.kernels._xla.gla").recurrent_gla
    q, k, v, g = _normal(*4 * [(B, T, H, V)])  # it wants keys as wide as values
    state = jnp.zeros((B, H, V, V))
    ours = lambda q, k, v, g: decayed_outer_product(q, k, v, g, RESET, state)[0]
    theirs = lambda q, k, v, g: gla(q, k, v, g, softmax_scale=1.0)[0]
    return Peer("gla", "ejkernel", (q, k, v, jax.nn.log_sigmoid(g) / 16), ours, theirs)


def _gated_delta_rule() -> Peer:
    theirs = importlib.import_module("ejkernel.kernels._xla.gated_delta_rule").gated_delta_rule
    q, k, v, b, g = _normal((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H))
    unit = lambda a: a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    state = jnp.zeros((B, H, K, V))
    ours = lambda q, k, v, b, g: delta_rule(q * K**-0.5, k, v, b, g[..., None], RESET, state)[0]
    arrays = (unit(q), unit(k), v, jax.nn.sigmoid(b), jax.nn.log_sigmoid(g + 3))
    run = lambda *a: theirs(*a, chunk_size=64, use_qk_l2norm=False)[0]
    return Peer("gated delta rule", "ejkernel", arrays, ours, run)


def _selective_scan() -> Peer:
    scan = importlib.import_module("ejkernel.kernels._xla.state_space_v1").state_space_v1
    u, dt, b, c = _normal((B, T, E), (B, T, E), (B, T, N), (B, T, N))
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N))
    state = jnp.zeros((B, E, N))
    ours = lambda u, dt, b, c: selective_scan(u, dt, b[:, :, None], c[:, :, None], RESET, A, state)[
        0
    ]
    theirs = lambda u, dt, b, c: scan(u, A, b, c, jnp.zeros(E), dt)[0]
    return Peer("selective scan", "ejkernel", (u, jax.nn.softplus(dt - 4), b, c), ours, theirs)
