"""Packed weights times eight-bit activations, in whole numbers; and what trits are packed in."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental.pallas import tpu as pltpu

from seqlab.errors import ConfigError, ModelError
from seqlab.kernels import trit_planes
from seqlab.kernels.quantize import by_token, ternary
from seqlab.kernels.ternary_matmul import packing, pallas_tpu, ternary_matmul
from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.plan import topology

#: K, N: blocks of 512, 256 and 128 inputs, and one of all; more columns than a step makes; one.
SHAPES = [(1024, 40), (768, 300), (384, 5), (171, 64), (7, 3), (1, 1)]


def trits(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(-1, 2, shape, np.int8)


def activations(*shape) -> np.ndarray:
    return np.random.default_rng(1).integers(-128, 128, shape, np.int8)


@pytest.mark.parametrize("K, N", SHAPES)
def test_what_is_packed_comes_back_in_both_forms(K, N):
    stacked = trits(2, K, N)
    packed = packing.pack(stacked)
    assert packed.shape == (2, -(-K // 4), N) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packing.unpack(packed, K), stacked)
    assert packing.is_packed(packed)
    squeezed = packing.squeeze(stacked)
    assert squeezed.shape == (2, -(-K // 5), N) and squeezed.dtype == np.uint8
    np.testing.assert_array_equal(packing.unsqueeze(squeezed, K), stacked)


def test_neighbours_lie_in_the_same_bits_of_neighbouring_bytes():
    packed = packing.pack(np.concatenate([trits(128, 1) * 0 + t for t in (-1, 0, 1, -1)]))
    assert packed.shape == (128, 1) and (np.asarray(packed) == 0b00_10_01_00).all()


def test_every_five_trits_have_a_byte_of_their_own():
    every = packing._every()
    assert len({tuple(row) for row in every}) == len(np.unique(packing.squeeze(every[..., None])))


def test_bits_and_bytes_that_are_no_trits_are_seen():
    packed = np.array(packing.pack(trits(64, 8)))
    packed[3, 2] |= 0b00110000
    assert not packing.is_packed(jnp.asarray(packed))
    squeezed = packing.squeeze(trits(64, 8))
    assert packing.unsqueeze(squeezed, 66) is None, "of another matrix"
    unused = set(range(256)) - set(packing.squeeze(packing._every()[..., None]).flat)
    squeezed[3, 2] = min(unused)
    assert packing.unsqueeze(squeezed, 64) is None


@pytest.mark.parametrize("shape", [(8,), (0, 8), (8, 0)])
def test_what_is_no_matrix_is_not_packed(shape):
    with pytest.raises(ModelError, match="cannot be packed: give matrices"):
        packing.pack(np.zeros(shape, np.int8))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu", None])
@pytest.mark.parametrize("K, N", SHAPES)
def test_products_are_exact(K, N, implementation):
    x, W = activations(3, 43, K), trits(K, N)
    if implementation == "pallas_tpu":
        interpret = pltpu.InterpretParams(uninitialized_memory="nan")
        run = functools.partial(pallas_tpu.ternary_matmul, interpret=interpret)
    else:
        run = functools.partial(ternary_matmul, implementation=implementation)
    y = jax.jit(run)(x, packing.pack(W))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x.astype(np.int64) @ W)


def test_the_kernel_fills_rows_and_columns_that_end_within_a_step(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "ROWS", 32)
    monkeypatch.setattr(pallas_tpu, "COLUMNS", 128)
    x, W = activations(45, 256), trits(256, 200)
    y = pallas_tpu.ternary_matmul(x, packing.pack(W), interpret=pltpu.InterpretParams())
    np.testing.assert_array_equal(y, x.astype(np.int64) @ W)


def test_it_is_the_fake_quantised_product():
    r = np.random.default_rng(0)
    x, W = r.standard_normal((5, 256), np.float32), r.standard_normal((256, 64), np.float32)
    (codes, scale), (weights, size) = by_token(x), ternary(W)
    whole = ternary_matmul(codes, packing.pack(weights))
    fake = np.asarray(codes, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_array_equal(whole, fake)
    near = np.asarray(whole * (scale * size))
    assert 0.3 < away(near, x @ W) < 0.7, "rounded, but of these"


def test_on_a_mesh_xla_divides_the_work():
    x, W = activations(4, 6, 512), trits(512, 64)
    with use_mesh(data=2, model=2):
        y = jax.jit(ternary_matmul)(x, packing.pack(W))
    np.testing.assert_array_equal(y, x.astype(np.int64) @ W)


@pytest.mark.parametrize(
    "x, packed",
    [
        (activations(2, 8).astype(np.float32), packing.pack(trits(8, 4))),
        (activations(2, 8), trits(8, 4)),
        (activations(2, 9), packing.pack(trits(8, 4))),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, packed):
    with pytest.raises(ModelError, match="ternary_matmul takes x .* int8 and W .* uint8, not"):
        ternary_matmul(x, packed)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="no implementation 'cuda'"):
        ternary_matmul(activations(2, 8), packing.pack(trits(8, 4)), implementation="cuda")


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
@pytest.mark.parametrize(
    "name, M, K, N, kernels",
    [
        ("v5e:2x2", 1, 2048, 2048, 1),
        ("v5e:2x2", 300, 2816, 1000, 1),
        ("v5p:2x2x1", 3, 1370, 40, 1),
        ("v5e:2x2", 8, 8204, 256, 0),  # one block of all inputs is too large
    ],
)
def test_on_a_tpu_it_is_the_kernel(name, M, K, N, kernels):
    mesh = make_mesh(devices=topology.parse(name).devices)
    shape = lambda *shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, P())
    )
    x, packed = shape(M, K, dtype=jnp.int8), shape(-(-K // 4), N, dtype=jnp.uint8)
    program = jax.jit(ternary_matmul).lower(x, packed).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == kernels


# ---- planes of trits ----


def gaussian(outliers: float = 0.0) -> np.ndarray:
    r = np.random.default_rng(0)
    w = r.normal(0, 0.02, (512, 256))
    return w * np.where(r.random(w.shape) < outliers, 4, 1)


def away(approximation, w) -> float:
    return float(np.linalg.norm(np.asarray(approximation) - w) / np.linalg.norm(w))


@pytest.mark.parametrize(
    "outliers, published", [(0.0, (0.434, 0.167, 0.077)), (0.02, (0.532, 0.234, 0.085))]
)
def test_planes_of_trits_are_as_near_as_published(outliers, published):
    """And nearer than the one plane that ternary weights are, whose error is 0.51 and 0.60."""
    w = gaussian(outliers)
    with jax.enable_x64(True):
        fits = [trit_planes.fit(w, planes) for planes in (1, 2, 3)]
    errors = [away(trit_planes.restored(*fitted), w) for fitted in fits]
    assert all(0.9 * there < e < 1.02 * there for e, there in zip(errors, published, strict=True))
    codes, scale = ternary(w)
    assert errors[0] < 0.9 * away(codes * scale, w)


def test_a_fit_never_gets_worse():
    w = jnp.asarray(gaussian(0.02)[:128].reshape(1, 128, -1))
    with jax.enable_x64(True):
        w = w.astype(jnp.float64)
        planes, errors = jnp.stack([jnp.sign(w)] * 3), []
        for _ in range(6):
            scales = trit_planes._scales(w, planes)
            planes = trit_planes._trits(w, scales)
            errors.append(away(jnp.einsum("pgkn,pgn->gkn", planes, scales), w))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_of_trits_that_say_the_same_those_with_most_zeros_are_taken():
    w, scales = jnp.array([0.0, 1.0, -1.0, 2.0]).reshape(1, 4, 1), jnp.ones((2, 1, 1))
    taken = trit_planes._trits(w, scales)
    np.testing.assert_array_equal(jnp.sum(taken, 0), w)
    np.testing.assert_array_equal(jnp.sum(jnp.abs(taken), 0), jnp.abs(w))


def test_what_planes_of_trits_can_say_they_say():
    """Also inputs that are no whole number of groups, zeros, and two planes of one scale."""
    w = np.concatenate([np.full((100, 3), 0.5), -np.full((60, 3), 2.0), np.zeros((11, 3))])
    with jax.enable_x64(True):
        fitted, scales = trit_planes.fit(w, 2)
        np.testing.assert_allclose(trit_planes.restored(fitted, scales), w, atol=1e-6)
    assert fitted.shape == (2, 171, 3) and scales.shape == (2, 2, 3)
    assert not np.asarray(fitted)[:, 160:].any()
