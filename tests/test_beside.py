"""States that travel while a device works: the numbers of one device, and a schedule that hides."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.parallel import compiler, lines, use_mesh
from seqlab.parallel.mesh import SEQ
from seqlab.plan import schedule, topology
from seqlab.plan.estimate import exposed

G, H, K, V = 1, 2, 4, 8  # query heads, heads
CHUNK = 16


def tokens(T, B=2, channels=1, normaliser=False):
    """Documents that begin anywhere, gates that forget all among gates that keep nearly all."""
    rng = np.random.default_rng(T)
    normal = lambda *shape: rng.normal(size=shape)
    gates = np.where(rng.random((B, T, H, channels)) < 0.02, -80.0, -0.01)
    reset = rng.random((B, T)) < 0.02
    state = normal(B, H, K, V + normaliser)
    return normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V), gates, state, reset


def differentiated(**options):
    def loss(*arguments):
        *floats, state, reset = arguments
        results = decayed_outer_product(*floats, reset, state, chunk_size=CHUNK, **options)
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(results)), results

    return jax.jit(jax.grad(loss, tuple(range(5)), has_aux=True))


@pytest.fixture
def beside(monkeypatch):
    """How many steps of work there are beside how many hops, for every loop that has both."""
    found, run = [], lines.Pipeline.beside

    def spy(self, work):
        def counted(scan):
            def steps(step, carry, xs, **options):
                found.append((len(jax.tree.leaves(xs)[0]), self.hops))
                return scan(step, carry, xs, **options)

            return work(steps)

        return run(self, counted)

    monkeypatch.setattr(lines.Pipeline, "beside", spy)
    return found


@pytest.mark.parametrize(
    "T, mesh, steps, options",
    [
        (176, {"data": 2, "seq": 2, "blocks": 2}, (2, 2), {}),  # and three and a half chunks more
        (160, {"seq": 4, "blocks": 4}, (2, 6), {"channels": 4}),  # several hops beside a chunk
        (96, {"seq": 2, "blocks": 4}, (2, 4), {"normaliser": True}),
        (32, {"seq": 2, "blocks": 4}, (1, 4), {}),  # and nothing after it
    ],
)
def test_what_travels_beside_work_is_exact(beside, T, mesh, steps, options):
    with jax.enable_x64(True):
        arguments = tokens(T, **options)
        normaliser = options.get("normaliser", False)
        expected = differentiated(normaliser=normaliser)(*arguments)
        assert not beside
        with use_mesh(strategy="all_scan", **mesh):
            actual = differentiated(normaliser=normaliser)(*arguments)
    assert beside == [steps, steps]  # forward and backward
    assert_close(actual[1], expected[1])
    assert_close(actual[0], expected[0], GRADIENT)


def test_with_too_few_chunks_or_another_strategy_work_waits(beside):
    with use_mesh(seq=4, strategy="all_scan", blocks=4):
        jax.eval_shape(differentiated(), *tokens(64))
    with use_mesh(seq=2, strategy="ring"):
        jax.eval_shape(differentiated(), *tokens(176))
    assert not beside


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
def test_on_a_tpu_local_work_hides_every_hop_forward_and_backward():
    there = topology.parse("v5e:2x2")
    mesh, heads, size, T = there.mesh(1, 4, 1), 8, 64, 4 * 8 * 64

    def layer(q, k, v, log_decay):
        reset, state = jnp.zeros((1, T), bool), jnp.zeros((1, heads, 2 * size, 2 * size))
        return decayed_outer_product(q, k, v, log_decay, reset, state, chunk_size=size)[0]

    def gradients(*floats):
        y, pullback = jax.vjp(layer, *floats)
        return pullback(y)

    place = jax.NamedSharding(mesh, P(None, SEQ))
    shape = lambda n, dtype: jax.ShapeDtypeStruct((1, T, heads, n), dtype, sharding=place)
    wide = [shape(2 * size, jnp.bfloat16)] * 3
    with use_mesh(strategy="all_scan", blocks=4), jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(*wide, shape(1, jnp.float32))
    program = lowered.compile(compiler_options=compiler.TPU).as_text()
    hops = [c for c in schedule.read(program or "").collectives if c.sent > 2**10]
    assert {c.kind for c in hops} == {"collective-permute"}
    state = heads * 4 * size * size * 4
    assert [(c.count, c.sent) for c in hops] == [(6, state / 4)] * 2  # 4 - 1 devices, 4 - 1 blocks
    assert all(exposed(c, there.link, there.device.clock) == 0 for c in hops)
    # a chunk takes some 60,000 cycles; were it to wait for its hop, 15,000 would be left beside
    assert all(c.hidden > 30_000 for c in hops)
