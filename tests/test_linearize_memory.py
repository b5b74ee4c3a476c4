"""What linearizing holds in memory: the teacher, what trains, and little beside them."""

import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from seqlab.layers import norm
from seqlab.layers.mixers import attention
from seqlab.linearize import dry_run
from seqlab.linearize.estimate import estimate
from seqlab.linearize.fit import fit
from seqlab.linearize.request import Request
from seqlab.linearize.swap import plan
from seqlab.models import lm, narrow
from seqlab.models.parameters import largest_first, parameters

CONFIG = lm.Config(
    vocab=65, d_model=64, pattern=(attention.Config(heads=2, max_length=16),), repeats=8
)


def test_a_model_of_bfloat16_is_never_held_in_float32():
    wide = CONFIG.build(rngs=nnx.Rngs(0))
    short = jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide)
    tokens = jnp.asarray(np.arange(8, dtype=np.int32)[None])
    loss = lambda model, shift: jnp.mean(jnp.square(model.logits(model.hidden(tokens)[0] + shift)))
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    shift = jnp.zeros(64)
    alone = jax.jit(jax.value_and_grad(loss, 1)).lower(short, shift).compile()
    stacks = sum(2 * a.nbytes for a in jax.tree.leaves(short.blocks))  # in float32
    assert alone.memory_analysis().temp_size_in_bytes < stacks / 2
    nats, (grads, _) = both(short, shift)
    assert nats == alone(short, shift)[0]
    expected, (wanted, _) = both(jax.tree.map(lambda a: a.astype(jnp.float32), short), shift)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    for name, grad in parameters(wanted).items():
        mine = np.asarray(parameters(grads)[name], np.float32)
        np.testing.assert_allclose(mine, grad, rtol=1e-2, atol=1e-2 * np.abs(grad).max())


def test_what_is_as_wide_as_the_computation_is_read_as_it_is():
    array, take = jnp.arange(6.0).reshape(3, 2), lambda a, at: a[at]
    text = str(jax.make_jaxpr(lambda a: narrow.read(take, a, jnp.int32(1), "float32"))(array))
    assert "bitcast" not in text
    short = array.astype(jnp.float16)
    assert (narrow.read(take, short, jnp.int32(1), "float32") == short[1]).all()


def test_large_weights_are_made_while_there_is_room():
    params = parameters(CONFIG.skeleton())
    sizes = [params[name].size for name in largest_first(params)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(params)


def test_weights_that_find_no_place_are_told(tmp_path):
    mixer = attention.Config(heads=2, qk_norm=norm.Config())
    teacher = lm.Config(vocab=65, d_model=16, pattern=(mixer,))
    made = plan(teacher, lambda old: fit("gla", old, 16))
    file = io.StringIO()
    request = Request("teacher", "liger", "gla", (), ())
    found = estimate(made, (), tmp_path)
    dry_run.show(request, found, Console(file=file, width=100))
    assert found.left == ("blocks.0.mixer.k_norm.weight", "blocks.0.mixer.q_norm.weight")
    assert (
        "without attention's k_norm.weight, q_norm.weight, which find no place" in file.getvalue()
    )
