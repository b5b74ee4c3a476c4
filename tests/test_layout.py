"""Models whose layers lie otherwise than they were saved, loaded so without being held twice."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import seqlab
from seqlab.errors import CheckpointError, ModelError
from seqlab.layers.mixers import attention
from seqlab.layers.registry import mixer_config
from seqlab.linearize import lora
from seqlab.linearize.swap import plan, swap
from seqlab.models import layout, lm, store
from seqlab.models.parameters import axes, parameters
from seqlab.parallel import use_mesh
from seqlab.parallel.mesh import weight_sharding
from tests import hf_folders
from tests.hf_folders import bits

ATTENTION = attention.Config(heads=4, kv_heads=2)
CONFIG = lm.Config(vocab=32, d_model=32, pattern=(ATTENTION,), repeats=4, tie_embeddings=False)
MAMBA2 = mixer_config("mamba2", heads=4, head_dim=8, d_state=8, groups=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return store.save(CONFIG.build(rngs=nnx.Rngs(0)), tmp_path_factory.mktemp("saved") / "model")


def laid_out(target, keep=()):
    """How a teacher lies for a swap to copy nothing."""
    return lambda config: plan(config, target, keep=keep).teacher


def windowed(a):
    return dataclasses.replace(a, window=7)


@pytest.mark.parametrize("kind", ["published", "saved"])
def test_a_model_loaded_for_a_swap_is_that_laid_out_anew_and_is_not_copied(kind, saved, tmp_path):
    folder = saved if kind == "saved" else hf_folders.write(tmp_path / "published")
    teacher = seqlab.load(folder, layout=laid_out(windowed, {1}))
    pair = swap(teacher, windowed, keep={1}, rngs=nnx.Rngs(0))
    assert pair.teacher is teacher and len(layout.stacks(teacher.config)) > 1
    as_saved = seqlab.load(folder)
    assert bits(parameters(teacher)) == bits(parameters(layout.relaid(as_saved, teacher.config)))
    again = layout.relaid(teacher, as_saved.config)
    assert bits(parameters(again)) == bits(parameters(as_saved))


def test_what_cannot_be_swapped_is_refused_before_weights_are_read(saved, monkeypatch):
    monkeypatch.setattr(store, "_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match="mamba2 cannot take over"):
        seqlab.load(saved, layout=laid_out(lambda _: dataclasses.replace(MAMBA2, groups=1)))


def test_while_a_model_is_laid_out_anew_one_weight_is_held_twice_at_most(monkeypatch):
    held = parameters(CONFIG.build(rngs=nnx.Rngs(0)))
    blocks = CONFIG.block(ATTENTION)
    other = dataclasses.replace(CONFIG, pattern=(blocks,), repeats=3, after=(blocks,))
    largest = max(array.nbytes for array in held.values())
    live = lambda: sum(array.nbytes for array in jax.live_arrays())
    before, seen = live(), []
    placed = layout.placed
    monkeypatch.setattr(layout, "placed", lambda *a: (placed(*a), seen.append(live()))[0])
    layout.restacked(held, CONFIG, other)
    assert held == {} and len(seen) > 10
    assert max(seen) - before <= largest + 4096


def test_on_a_mesh_every_weight_goes_to_its_place_and_the_model_is_the_same(saved, tmp_path):
    tokens = np.arange(2 * 16).reshape(2, 16) % 32
    run = jax.jit(lambda model, tokens: model(tokens)[0])

    def made():
        teacher = seqlab.load(saved)
        pair = swap(teacher, lambda _: MAMBA2, keep={0}, rngs=nnx.Rngs(1))
        return pair, lora.wrap(pair.student, ("out",), 2, 2.0, rngs=nnx.Rngs(2))

    alone, _ = made()
    with use_mesh(model=2) as mesh:
        pair, wrapped = made()
        for model in (*pair[:2], wrapped):
            names = axes(model)
            for name, array in parameters(model).items():
                place = weight_sharding(array.shape, names[name], mesh)
                assert array.sharding.is_equivalent_to(place, array.ndim), name
        assert bits(parameters(pair.student)) == bits(parameters(alone.student))
        sharded = np.asarray(run(pair.student, tokens))
        merged = parameters(lora.merge(wrapped))
    assert bits(merged) == bits(parameters(alone.student))
    np.testing.assert_allclose(sharded, run(alone.student, tokens), atol=1e-4)


def test_on_a_mesh_a_damaged_file_is_refused_all_the_same(saved, tmp_path):
    broken = store.save(seqlab.load(saved), tmp_path / "model")
    (broken / store.WEIGHTS).write_bytes(b"junk")
    store.artifacts.write_manifest(broken)
    with use_mesh(model=2), pytest.raises(CheckpointError):
        seqlab.load(broken)
