"""GPU kernels of the chunked families: interpreted against the definitions, lowered for GPUs."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from seqlab.conformance.tolerance import GRADIENT, allowed, worst
from seqlab.errors import ModelError
from seqlab.kernels import platforms
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.on_gpu import blocks, chunk_scan
from seqlab.layers.mixers import gla
from seqlab.models import lm
from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.train import state as states
from seqlab.train.corpus import Batch
from seqlab.train.step import make_step

CHUNK = 32
FAMILIES: dict[str, Any] = {"outer product": decayed_outer_product, "delta rule": delta_rule}
EVERYWHERE = {"chunk_outputs", "chunk_states", "chunk_couplings", "chunk_states_backward"}


def tokens(family, G, H, K, V, channels, normaliser=False, B=1, T=72, dtype: Any = "f8"):
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
    "family, G, H, channels, dtype",
    [
        ("outer product", 1, 2, 1, "f8"),  # with a normaliser, and keys that heads share
        ("delta rule", 1, 2, 1, jnp.bfloat16),
        ("delta rule", 2, 2, 32, "f4"),
    ],
)
def test_kernels_equal_the_definition(family, G, H, channels, dtype, small_pieces):
    options = {"normaliser": True} if family == "outer product" else {}
    with jax.enable_x64(dtype == "f8"):
        args = tokens(family, G, H, 32, 32, channels, *options.values(), dtype=dtype)
        run = functools.partial(FAMILIES[family], implementation="reference", **options)
        wide = [a if a.dtype == bool else a.astype(np.promote_types(a.dtype, "f4")) for a in args]
        actual, expected = values_and_gradients(interpreted, args), values_and_gradients(run, wide)
    assert worst(actual[0], expected[0])[0] < allowed(dtype)
    assert worst(actual[1], expected[1])[0] < allowed(dtype, GRADIENT)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_kernels_cannot_do_xla_does(family):
    args = tokens(family, 1, 1, 8, 8, 1, T=20, dtype=np.float32)
    with pytest.raises(ModelError, match="takes keys and values of one dtype and of width 64"):
        FAMILIES[family](*args, implementation="pallas_gpu")


def kernels_for_gpus(f, *args) -> set[str]:
    """Names of the kernels in f's program for a GPU."""
    text = f.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    return {found[1] for line in calls if (found := re.search(r'\bname = "(\w+)"', line))}


def test_on_a_mesh_of_gpus_both_passes_are_kernels():
    args = tokens("delta rule", 2, 2, 64, 64, 1, B=2, T=80, dtype=jnp.bfloat16)
    mesh = make_mesh(2, 1, 2, jax.devices()[:4])
    split = lambda a: jax.NamedSharding(mesh, P(*("data", None, "model")[: a.ndim]))
    *floats, reset, state = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split(a)) for a in args[:-1]
    ] + [jax.ShapeDtypeStruct(args[-1].shape, jnp.float32, sharding=jax.NamedSharding(mesh, P()))]

    def loss(floats, reset, state):
        y, state = delta_rule(*floats, reset, state)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state)

    with use_mesh(), jax.set_mesh(mesh):
        found = kernels_for_gpus(jax.jit(jax.grad(loss)), floats, reset, state)
    solving = {"chunk_inverse", "chunk_corrections"}
    assert found == {*EVERYWHERE, *solving, "head_scores", "head_gradient"}


def test_a_train_step_of_gla_for_gpus_has_the_kernels():
    mixer = gla.Config(heads=2, expand_k=1.0)
    model = lm.Config(vocab=64, d_model=128, pattern=(mixer,), dtype="bfloat16").skeleton()
    optimizer = optax.sgd(0.1)
    row: Any = jax.ShapeDtypeStruct((2, 81), jnp.int32)
    state = states.abstract(model, optimizer, make_mesh(1, 1, 1, jax.devices()[:1]))
    found = kernels_for_gpus(make_step(model, optimizer), *state, Batch(row, row))
    channels = {"channel_operands", "channel_scores", "channel_pairs", "channel_gradient"}
    assert found == EVERYWHERE | channels
