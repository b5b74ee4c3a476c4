"""Short convolutions and token shifts while time is split: one hop to the next device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.short_conv import short_conv
from seqlab.layers.token_shift import previous
from seqlab.parallel.mesh import use_mesh

B, T, D, W = 2, 24, 4, 4


@functools.cache
def inputs():
    """x, taps, what was before for either; and documents that start at borders of shards too."""
    r = np.random.default_rng(0)
    shapes = (B, T, D), (W, D), (B, W - 1, D), (B, D)
    reset = np.zeros((B, T), bool)
    reset[0, [6, 7, 17]] = reset[1, [12, 23]] = True
    return [r.normal(size=shape) for shape in shapes], reset


def outputs(x, taps, before, last, reset):
    return *short_conv(taps, x, reset, before), *previous(x, last, reset)


def with_gradients(arrays, reset):
    results, pull = jax.vjp(lambda *arrays: outputs(*arrays, reset), *arrays)
    return results, pull(tuple(jnp.cos(a) for a in results))


def placed(mesh, arrays, reset):
    specs = ("data", "seq", "model"), (None, "model"), ("data", None, "model"), ("data", "model")
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, jax.P(*spec)))
    return [put(a, spec) for a, spec in zip(arrays, specs, strict=True)], put(reset, specs[0][:2])


@pytest.mark.parametrize(
    "axes", [{"seq": 2}, {"seq": 8}, {"data": 2, "seq": 2, "model": 2}], ids=str
)
def test_outputs_states_and_gradients_equal_one_device(axes):
    with jax.enable_x64(True):
        arrays, reset = inputs()
        expected = jax.jit(with_gradients)(arrays, reset)
        with use_mesh(**axes) as mesh:
            actual = jax.jit(lambda *a: with_gradients(*a))(*placed(mesh, arrays, reset))
        assert_close(actual[0], expected[0])
        assert_close(actual[1], expected[1], GRADIENT)


def test_a_document_reads_nothing_of_the_one_before_it_across_a_border():
    with use_mesh(seq=8) as mesh:
        (x, *rest), reset = inputs()
        loss = lambda x: outputs(x, *rest, reset)[0][0, 6:7].sum()  # a document starts with shard 2
        read = jax.jit(jax.grad(loss))(placed(mesh, [x, *rest], reset)[0][0])
    assert (np.abs(read[0]).sum(-1) > 0).nonzero()[0].tolist() == [6]


@pytest.mark.parametrize("which, numbers", [(0, (W - 1) * D), (2, D)], ids=["conv", "shift"])
def test_one_hop_of_the_state_is_all_that_travels(which, numbers):
    with use_mesh(seq=8) as mesh:
        arrays, reset = placed(mesh, *inputs())
        run = jax.jit(lambda *arrays: outputs(*arrays, reset)[which])
        program = run.lower(*arrays).compile().as_text()
    travels = r"= f32\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    ((shape, kind),) = re.findall(travels, program)
    assert kind == "collective-permute"
    assert np.prod([int(n) for n in shape.split(",")]) == B * numbers


def test_a_shard_that_is_shorter_than_the_taps_is_right_too():
    with use_mesh(seq=8) as mesh:
        arrays, reset = inputs()
        x, *rest = (jnp.asarray(a, jnp.float32) for a in arrays)
        short = x[:, :16], reset[:, :16]
        run = lambda x, reset: outputs(x, *rest, reset)
        actual = jax.jit(lambda *a: run(*a))(*(jax.device_put(a) for a in short))
        assert mesh.shape["seq"] * (W - 1) > 16
    assert_close(actual, jax.jit(run)(*short))
