"""A prefix that every token of its document reads: the mixer against all pairs, what must come in
one call, prompts read in chunks and read twice, and the objective that goes with it."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.compiling import compiled
from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, ModelError
from seqlab.evaluate.perplexity import perplexity
from seqlab.infer import command as commands
from seqlab.infer import text
from seqlab.infer.session import Session
from seqlab.layers.mixers import prefix_linear_attention
from seqlab.models import lm, store
from seqlab.models.parameters import decays, parameters
from seqlab.models.tokenizer import ByteTokenizer
from seqlab.parallel import use_mesh
from seqlab.train.config import Checkpoint, Optimizer, load
from seqlab.train.corpus import Batch, open_corpus
from seqlab.train.loop import train
from seqlab.train.objective import NextToken, Prefix
from seqlab.train.sources import Text
from seqlab.train.step import cross_entropy, make_evaluation, make_step
from tests.runs import losses, tiny, write_texts

PREFIX, D, HEADS, VOCAB = 5, 8, 2, 258
MIXER = prefix_linear_attention.Config(PREFIX, heads=HEADS, key_dim=3, chunk_size=8)
LENGTH = 24
STARTS = [[], [2, 11, 12, 21], [6]]  # where documents start, in three rows


@functools.cache
def build():
    return jax.jit(lambda: MIXER.build(D, rngs=nnx.Rngs(0)))()


def inputs():
    x = np.random.default_rng(0).normal(size=(len(STARTS), LENGTH, D)).astype(np.float32)
    reset = np.zeros(x.shape[:2], bool)
    for row, starts in zip(reset, STARTS, strict=True):
        row[starts] = True
    return x, reset


def all_pairs(mixer, x, reset):
    """The definition, with a score for every pair of tokens."""
    T, document = x.shape[1], np.cumsum(reset, 1)
    together = document[:, :, None] == document[:, None, :]
    position = np.array(
        [[t - max([0, *np.flatnonzero(r[: t + 1])]) for t in range(T)] for r in reset]
    )
    split = lambda linear: (x @ linear.weight[...]).reshape(*x.shape[:2], HEADS, -1)

    def scores(k, seen):
        u = jnp.einsum("bihd,bjhd->bhij", split(mixer.q), split(k)) / MIXER.key_dim**0.5
        return jnp.where(seen[:, None], 1 + u + u * u / 2, 0)

    own = scores(mixer.k, together & np.tri(T, dtype=bool))
    prefix = scores(mixer.prefix_k, together & (position < PREFIX)[:, None, :])
    read = lambda a, v: jnp.einsum("bhij,bjhv->bihv", a, split(v))
    total = jnp.moveaxis((own + prefix).sum(-1), 1, 2)[..., None] + MIXER.eps
    y = (read(own, mixer.v) + read(prefix, mixer.prefix_v)) / total
    return y.reshape(*x.shape[:2], -1) @ mixer.out.weight[...]


def test_the_mixer_and_its_gradients_equal_all_pairs():
    x, reset = inputs()
    weights = np.random.default_rng(1).normal(size=x.shape)
    value = lambda run: lambda mixer, x: (jnp.vdot(weights, y := run(mixer, x, reset)), y)
    empty = jax.tree.map(np.asarray, build().init_state(len(x)))
    wider = empty._replace(memory=empty.memory.astype(np.float64))
    run = lambda mixer, x, reset: mixer(x, wider, reset=reset)[0]
    with jax.enable_x64(True):
        widen = lambda a: np.asarray(a, np.float64) if a.dtype == np.float32 else a
        wide = jax.tree.map(widen, (build(), x))
        (actual, gradient), (expected, wanted) = (
            compiled(lambda *a, f=f: _results(value(f), *a))(*wide) for f in (run, all_pairs)
        )
    assert_close(actual, expected)
    assert_close(gradient, wanted, GRADIENT)
    assert actual.dtype == np.float64 and len(jax.tree.leaves(gradient)) == 7


def _results(f, *args):
    gradient, y = jax.grad(f, (0, 1), has_aux=True)(*args)
    return y, gradient


def test_a_prefix_is_seen_whole_by_its_document_and_by_no_other():
    x, reset = inputs()
    run = jax.jit(build().__call__)
    y, _ = run(x, reset=reset)
    for token, seen_from in ((2 + PREFIX - 1, 2), (2 + PREFIX, 2 + PREFIX)):
        other = x.copy()
        other[1, token] += 1
        moved = (np.asarray(run(other, reset=reset)[0]) != np.asarray(y)).any((0, 2))
        assert np.flatnonzero(moved).tolist() == list(range(seen_from, 11))


def test_a_cut_inside_a_prefix_is_refused_where_it_can_be_known():
    x, _ = map(jnp.asarray, inputs())
    mixer = build()
    _, state = jax.jit(mixer.__call__)(x[:, :3])
    with pytest.raises(ModelError, match=r"stands at token 3 of a prefix of 5 .* in one call"):
        mixer(x[:, 3:9], state)
    mixer(x[:, 3:9], state, reset=jnp.arange(6) < jnp.ones((3, 1)))


def test_a_cut_inside_a_prefix_is_nan_where_it_cannot_be_known_until_the_document_ends():
    x, _ = inputs()
    run = jax.jit(build().__call__)
    begins = np.zeros((3, 8), bool)
    begins[1, 0] = begins[2, 2] = True
    _, state = run(x[:, :3])
    y, state = run(x[:, :8], state, reset=begins)
    bad = np.isnan(y).all(2)
    np.testing.assert_array_equal(bad, np.isnan(y).any(2))
    assert bad.sum(1).tolist() == [8, 0, 2] and bad[2, :2].all()
    again, state = run(x[:, 8:16], state)
    assert np.isnan(again[0]).all() and np.isfinite(again[1:]).all()
    fresh, _ = run(x[:1, :8])
    renewed, _ = run(x[:, :8], state, reset=np.arange(8) < np.ones((3, 1)))
    assert_close(renewed[:1], fresh)


@pytest.fixture(scope="module")
def model():
    config = lm.Config(vocab=VOCAB, d_model=D, pattern=(MIXER,), repeats=2, ffn=None)
    return jax.jit(lambda: config.build(rngs=nnx.Rngs(0)))()


ROWS = [np.arange(n) * 7 % 256 for n in (19, 9, PREFIX)]


def test_no_chunk_of_a_prompt_ends_inside_a_prefix(model):
    run = jax.jit(lambda tokens: model(tokens)[0][:, -1])
    session = Session(model, chunk_size=2)
    session.feed(ROWS)
    for b, row in enumerate(ROWS):
        assert_close(session.logits[b], run(row[None])[0])
    streamed = Session(model, chunk_size=2)
    streamed.feed(iter(np.split(ROWS[0], 19)))
    assert_close(streamed.logits[0], session.logits[0])
    tokens = session.complete(3).tokens
    np.testing.assert_array_equal(streamed.complete(3).tokens[0], tokens[0])


def test_nothing_follows_a_prompt_that_is_shorter_than_the_prefix(model):
    session = Session(model)
    session.feed([ROWS[0], ROWS[0][:3]])
    for go_on in (lambda: session.generate(1), lambda: session.feed([1])):
        with pytest.raises(ModelError, match="has 3 tokens, fewer than the prefix of 5 .*twice"):
            go_on()


@pytest.mark.parametrize("prefix, times", [(0, 2), (6, 2), (7, 3), (20, 6), (1000, 251)])
def test_a_text_is_repeated_until_it_is_longer_than_the_prefix(prefix, times):
    assert text.repeated("abc", ByteTokenizer().encode, prefix) == "\n".join(["abc"] * times)


def test_a_prompt_is_read_twice_or_as_often_as_fills_the_prefix(model, tmp_path, capsys):
    saved = store.save(model, tmp_path / "model")

    def run(**options):
        commands.generate(saved, **{"steps": 4, "as_json": True, **options})
        row = json.loads(capsys.readouterr().out)
        return row["prompt_tokens"], row["tokens"]

    (tmp_path / "p.txt").write_text("ab", "utf-8")
    expected = run(prompt="ab\nab\nab")
    assert expected[0] == 9
    assert run(prompt="ab", read_twice=True) == expected
    assert run(prompt_file=str(tmp_path / "p.txt"), read_twice=True) == expected
    assert run(prompt="hello", read_twice=True) == run(prompt="hello\nhello")
    with pytest.raises(ModelError, match="has 3 tokens, fewer than the prefix of 5 .*--read-twice"):
        run(prompt="ab")
    with pytest.raises(ConfigError, match="--read-twice begins a text, and --state goes on"):
        run(prompt="ab", read_twice=True, state=tmp_path / "s")


def test_a_message_is_read_twice_inside_its_template(model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(commands, "_conversation", lambda *given: said.append(given) or [1] * 9)
    commands.generate(store.save(model, tmp_path / "model"), prompt="hello", chat=True, steps=1)
    commands.generate(tmp_path / "model", prompt="hello", chat=True, read_twice=True, steps=1)
    assert [given[0] for given in said] == ["hello", "hello\nhello"]


OBJECTIVE = Prefix(PREFIX, VOCAB - 1, rate=0.4, weight=0.5)
SEGMENTS = np.array([[1] * 13, [1] * 3 + [2] * 9 + [0], [1] * 6 + [2] * 7, [1] * 4 + [0] * 9])


def batch():
    tokens = np.random.default_rng(3).integers(0, 256, SEGMENTS.shape)
    return Batch(tokens.astype(np.int32), SEGMENTS.astype(np.int32))


def by_hand(model, tokens, segments, shown):
    """Nats of the next tokens beyond the prefix, and of masked ones, if the model is `shown` so."""
    reset = np.diff(segments[:, :-1], axis=1, prepend=segments[:, :1]) != 0
    logits = np.asarray(jax.jit(model.__call__)(shown, reset=reset)[0], np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.moveaxis(logits, 2, 0)  # [V, B, T]
    following, masked = [], []
    for b, ids in enumerate(segments):
        for t in range(shown.shape[1]):
            position = t - int(np.flatnonzero(ids == ids[t])[0])
            if shown[b, t] != tokens[b, t]:
                assert shown[b, t] == OBJECTIVE.mask and position < PREFIX and ids[t]
                masked.append(nats[tokens[b, t], b, t])
            if position >= PREFIX and ids[t] and ids[t] == ids[t + 1]:
                following.append(nats[tokens[b, t + 1], b, t])
    return following, masked


def stepped(model, objective, accumulate=1, steps=1, **mesh):
    """Metrics of every step, and the parameters after them."""
    optimizer = Optimizer(clip=0.1, warmup=0, schedule="constant").build(1, decays(model))
    params = {name: jnp.array(np.asarray(a)) for name, a in parameters(model).items()}
    with use_mesh(**mesh) if mesh else contextlib.nullcontext():
        step, state = (
            make_step(model, optimizer, accumulate, cross_entropy, objective.ask, 7),
            optimizer.init(params),
        )
        metrics = []
        for _ in range(steps):
            params, state, now = step(params, state, batch())
            metrics.append(jax.device_get(now))
    return metrics, jax.device_get(params)


def test_the_loss_is_that_of_next_tokens_beyond_the_prefix_and_of_masked_ones_in_it(model):
    tokens, segments = batch()
    (first, second), _ = stepped(model, OBJECTIVE, steps=2)
    key = jax.random.fold_in(jax.random.key(7), 0)
    shown = np.asarray(OBJECTIVE.ask(batch(), key).tokens)
    following, masked = by_hand(model, tokens, segments, shown)
    assert_close(first["loss"], np.float32(np.mean(following) + 0.5 * np.mean(masked)))
    assert len(following) == 7 + 3 + 1 and 5 < len(masked) < 17 < 5 + 3 + 5 + 5 + 5 + 4
    assert first["tokens"] == len(following) + len(masked)
    assert second["tokens"] != first["tokens"], "the masks of two steps are alike"


def test_an_evaluation_masks_nothing_and_counts_what_lies_beyond_the_prefix(model):
    tokens, segments = batch()
    total = make_evaluation(model, OBJECTIVE.ask)(parameters(model), batch())
    following, masked = by_hand(model, tokens, segments, tokens[:, :-1])
    assert total.tokens == len(following) and not masked
    assert_close(total.nats, np.float32(np.sum(following)))


def test_parts_and_shards_of_a_batch_are_masked_and_weighed_as_the_whole_is(model):
    (whole,), params = stepped(model, OBJECTIVE)
    for way in ({"accumulate": 2}, {"data": 2, "seq": 2}):
        (metrics,), updated = stepped(model, OBJECTIVE, **way)
        assert metrics["tokens"] == whole["tokens"]
        assert_close(metrics["loss"], whole["loss"])
        assert_close(updated, params, GRADIENT)


@pytest.fixture
def run(model, tmp_path):
    texts = write_texts(tmp_path / "texts")
    objective = Prefix(PREFIX, VOCAB - 1)
    fields = {"model": model.config, "objective": objective, "checkpoint": Checkpoint(every=2)}

    def run(name, **changes):
        train(tiny(texts, **fields | {"evaluate_every": 0} | changes), tmp_path / name, say=str)
        return losses(tmp_path / name)

    return run


def test_a_run_that_is_resumed_masks_what_it_would_have_masked(run):
    run("twice", steps=2)
    assert run("twice", steps=4) == run("once", steps=4)


@pytest.mark.parametrize(
    "objective, refusal",
    [
        (NextToken(), r"first 5 tokens .* see one another.*objective=Prefix\(prefix_len=5"),
        (Prefix(4, 257), "objective.prefix_len = 4 but the prefix of the model is 5"),
        (Prefix(PREFIX, 258), "objective.mask = 258 is outside the vocabulary of 258"),
    ],
)
def test_an_objective_that_does_not_fit_the_model_is_refused(run, objective, refusal):
    with pytest.raises(ConfigError, match=refusal):
        run("refused", objective=objective)


def test_rows_that_are_no_longer_than_the_prefix_are_refused(model):
    with pytest.raises(ConfigError, match="data.length = 5 leaves no token beyond .* = 5"):
        OBJECTIVE.check(model, PREFIX)


def test_what_a_model_says_within_its_prefix_is_no_prediction(model, tmp_path):
    texts = Text((f"{write_texts(tmp_path / 'texts')}/*.txt",))
    with pytest.raises(
        ModelError, match="first 5 tokens .* is no prediction: measure it on a task"
    ):
        perplexity(model, open_corpus(texts, ByteTokenizer()))


def test_the_published_config_has_as_many_weights_and_trains():
    config = load("configs/jrt_360m.py")
    model = config.model.skeleton()
    config.objective.check(model, config.data.length)
    assert sum(a.size for a in parameters(model).values()) == 356_611_072
