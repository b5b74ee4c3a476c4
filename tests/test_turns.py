"""Documents of many lengths in turns: where each goes, and the gradients of one device."""

import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, DataError
from seqlab.layers.mixers import attention, gla
from seqlab.models import lm
from seqlab.models.parameters import parameters
from seqlab.parallel import turns, use_mesh
from seqlab.parallel.groups import Costs
from seqlab.train.config import Mesh
from seqlab.train.corpus import Batch
from seqlab.train.step import make_step
from seqlab.train.turns import TurnTraining
from tests.runs import tiny

SOFTMAX = Costs(token=1e-6, attend=1e-8, exchange=3e-7, start=1e-4)
SHARE = 64


def random_lengths(seed, count):
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(3, 1.2, count)), 2, 4 * SHARE + 1).astype(int)


@pytest.mark.parametrize("data, count", [(1, 12), (2, 40), (2, 200)])
def test_every_document_is_in_one_row_that_has_room(data, count):
    lengths = random_lengths(count, count)
    found = turns.plan(lengths, SHARE, data, 4, SOFTMAX)
    rows = [(turn.devices, row) for turn in found.turns for row in turn.rows]
    assert sorted(i for _, row in rows for i in row) == list(range(count))
    assert all(lengths[list(row)].sum() <= devices * SHARE + 1 for devices, row in rows)
    assert all(len(turn.rows) <= data * 4 // turn.devices for turn in found.turns)
    each = {d: SOFTMAX.start + SOFTMAX.seconds(d * SHARE, d) for d in (1, 2, 4)}
    assert found.seconds == pytest.approx(sum(each[turn.devices] for turn in found.turns))
    assert found.seconds <= found.static_seconds


def test_the_numbers_of_turns_are_the_best_of_all():
    """Documents that fill rows exactly: every number of turns of each size is tried."""
    lengths = np.array([4 * SHARE, *[2 * SHARE] * 3, *[SHARE // 2] * 11])
    found = turns.plan(lengths, SHARE, 1, 4, SOFTMAX, gap=0)
    seconds = [SOFTMAX.start + float(SOFTMAX.seconds(d * SHARE, d)) for d in (1, 2, 4)]
    possible = [
        n
        for n in itertools.product(range(6), repeat=3)
        if n[2] >= 1 and 2 * n[1] + n[2] - 1 >= 3 and 4 * SHARE * sum(n) >= lengths.sum()
    ]
    best = min(np.dot(n, seconds) for n in possible)
    assert found.seconds == pytest.approx(best)
    assert found.speedup > 1.2 and found.static_devices == 4
    assert f"{found.speedup:.2f} times as fast as all on 4" in str(found)


def test_a_document_longer_than_a_row_and_meshes_that_do_not_halve_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="A document has 258 tokens but a row of 4 devices holds"):
        turns.plan([258], SHARE, 1, 4, SOFTMAX)
    for seq in (1, 6):
        with pytest.raises(ConfigError, match=f"mesh.groups halves the mesh.seq = {seq} devices"):
            Mesh(seq=seq, groups=True)
    with pytest.raises(ConfigError, match="leave out accumulate = 2"):
        tiny(tmp_path, mesh=Mesh(seq=2, groups=True), accumulate=2)
    assert turns.plan([], SHARE, 1, 4, SOFTMAX).turns == ()


def packed(lengths, rows, length):
    """A batch with these documents, each in the first row with room."""
    batch, ends = Batch(*np.zeros((2, rows, length + 1), np.int32)), np.zeros(rows, int)
    rng = np.random.default_rng(0)
    for number, n in enumerate(lengths):
        row = int(np.argmax(ends + n <= length + 1))
        place = row, slice(ends[row], ends[row] + n)
        batch.tokens[place], batch.segment_ids[place] = rng.integers(0, 31, n), number + 1
        ends[row] += n
    return batch


def test_turns_have_the_gradients_of_one_device():
    pattern = (gla.Config(heads=2, chunk_size=16), attention.Config(heads=2, max_length=64))
    config = lm.Config(vocab=31, d_model=16, pattern=pattern, ffn=None)
    batch = packed([60, 15, 14, 13, 12, 9, 9, 5, 3, 2, 1], rows=4, length=64)
    model, optimizer = config.skeleton(), optax.apply_if_finite(optax.sgd(1.0), 5)
    start = jax.jit(lambda: parameters(config.build(rngs=nnx.Rngs(0))))()
    alone = make_step(model, optimizer)
    expected, _, metrics = alone(copied(start), optimizer.init(start), batch)
    said = []
    with use_mesh(data=2, seq=4) as mesh:
        training = TurnTraining(model, optimizer, mesh, said.append)
        training.costs = SOFTMAX
        placed = training.place(batch)
        assert len({mesh.shape["seq"] for mesh, _ in placed[1]}) > 1
        actual, _, more = training.step(copied(start), optimizer.init(start), placed)
    step = lambda params: jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, start)
    assert_close(step(actual), step(expected), GRADIENT)
    assert_close(more["loss"], metrics["loss"])
    assert more["tokens"] == metrics["tokens"] and float(more["predicted_speedup"]) >= 1
    assert "predicted to be" in said[0]


def copied(params):
    """The step takes them over."""
    return jax.tree.map(lambda a: a.copy(), params)
