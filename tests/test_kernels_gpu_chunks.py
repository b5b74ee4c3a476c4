"""GPU kernels of the chunked families: interpreted against the definitions, lowered for GPUs."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.on_gpu import blocks, chunk_scan
from seqlab.parallel.mesh import make_mesh, use_mesh

CHUNK = 16
FAMILIES: dict[str, Any] = {"outer product": decayed_outer_product, "delta rule": delta_rule}
EVERYWHERE = {"chunk_outputs", "chunk_states", "chunk_couplings", "chunk_states_backward"}
SOLVING = {"chunk_inverse", "chunk_corrections"}
KERNELS = {
    ("outer product", 1): {"head_scores", "head_gradient"},
    ("delta rule", 1): {"head_scores", "head_gradient", *SOLVING},
}


def tokens(family, G, H, K, V, channels, normaliser=False, B=1, T=40, dtype: Any = "f8"):
    """Two whole chunks and a part of one, with documents and gates that wipe out everything."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    q, k, v = draw(B, T, G, K), draw(B, T, G, K), draw(B, T, H, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    weak = -rng.exponential(size=(B, T, H, channels)) * 0.3
    log_decay = np.where(rng.random(weak.shape) < 0.1, -80.0, weak)
    gates = [log_decay] if family == "outer product" else [2 * rng.random((B, T, H)), log_decay]
    reset, state = rng.random((B, T)) < 0.06, draw(B, H, K, V + normaliser)
    wide = np.promote_types(dtype, np.float32)
    few = [a.astype(dtype) for a in (q, k, v)]
    return *few, *(a.astype(wide) for a in gates), reset, state.astype(wide)


def values_and_gradients(run, args):
    """Results of `run` and what a fixed cotangent of them gives, of all arguments but reset."""
    *floats, reset, state = map(jnp.asarray, args)

    @jax.jit
    def both(floats, state):
        out, pull = jax.vjp(lambda floats, state: run(*floats, reset, state), floats, state)
        weights = lambda a: jnp.cos(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
        return out, pull(jax.tree.map(lambda a: weights(a).astype(a.dtype), out))

    return both(floats, state)


def interpreted(*args):
    """The kernels, of sizes that no GPU would take."""
    *given, state = args
    forms = platforms.Forms(chunk_scan.OnGPU(CHUNK, interpret=True))
    return platforms.scan(forms, tuple(given), state)


@pytest.fixture
def small_pieces(monkeypatch):
    """Keys and values in several pieces."""
    monkeypatch.setattr(blocks, "chosen", lambda kernel: blocks.Blocks((16, 16), 1))


@pytest.mark.parametrize(
    "family, G, H, channels, normaliser",
    [
        ("outer product", 1, 2, 1, True),
        ("delta rule", 1, 2, 1, False),
    ],
)
def test_kernels_equal_the_definition(family, G, H, channels, normaliser, small_pieces):
    with jax.enable_x64(True):
        args = tokens(family, G, H, 32, 32, channels, normaliser)
        options = {"normaliser": True} if normaliser else {}
        run = functools.partial(FAMILIES[family], implementation="reference", **options)
        actual, expected = (values_and_gradients(f, args) for f in (interpreted, run))
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], GRADIENT)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_kernels_cannot_do_xla_does(family):
    args = tokens(family, 1, 1, 8, 8, 1, T=20, dtype=np.float32)
    with pytest.raises(ModelError, match="takes keys and values of one dtype and of width 64"):
        FAMILIES[family](*args, implementation="pallas_gpu")


def kernels_for_gpus(f, *args) -> set[str]:
    """Names of the kernels in f's program for a GPU."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    return {found[1] for line in calls if (found := re.search(r'\bname = "(\w+)"', line))}


@pytest.mark.parametrize("family, channels", KERNELS)
def test_on_a_mesh_of_gpus_both_passes_are_kernels(family, channels):
    args = tokens(family, 2, 2, 64, 64, channels, B=2, T=80, dtype=jnp.bfloat16)
    mesh = make_mesh(2, 1, 2, jax.devices()[:4])
    split = lambda a: jax.NamedSharding(mesh, P(*("data", None, "model")[: a.ndim]))
    *floats, reset, state = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split(a)) for a in args[:-1]
    ] + [jax.ShapeDtypeStruct(args[-1].shape, jnp.float32, sharding=jax.NamedSharding(mesh, P()))]

    def loss(floats, reset, state):
        y, state = FAMILIES[family](*floats, reset, state)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    with use_mesh(), jax.set_mesh(mesh):
        found = kernels_for_gpus(jax.grad(loss), floats, reset, state)
    assert found == EVERYWHERE | KERNELS[family, channels]
