"""Generation gives what the model says, however the prompt comes and whatever shares the batch."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError, DataError, ModelError
from seqlab.infer import decode
from seqlab.infer.generate import generate
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Session
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from tests.leaky import VOCAB, tiny

RNG = np.random.default_rng(0)
PROMPT = RNG.integers(0, VOCAB, 45).astype(np.int32)
RAGGED = [RNG.integers(0, VOCAB, n) for n in (1, 37, 20)]
MORE = [RNG.integers(0, VOCAB, n) for n in (30, 3, 19)]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def recompute(model):
    """Logits [T, V] of one row, all at once."""
    whole = jax.jit(lambda tokens: model(tokens)[0][0])
    return lambda tokens: np.asarray(whole(np.asarray(tokens, np.int32)[None]))


def fed(model, *prompts, **options):
    session = Session(model, **options)
    for prompt in prompts:
        session.feed(prompt)
    return session


def test_decoding_equals_recomputing_from_scratch(model, recompute):
    tokens = generate(model, PROMPT, steps=20)
    whole = recompute(np.concatenate([PROMPT, tokens]))
    np.testing.assert_array_equal(tokens, whole[len(PROMPT) - 1 : -1].argmax(-1))
    assert len(set(tokens.tolist())) > 3


def test_the_size_of_chunks_and_blocks_does_not_matter(model, recompute):
    expected = recompute(PROMPT)[-1]
    for chunk_size in (1, 7, 45, 512):
        assert_close(fed(model, PROMPT, chunk_size=chunk_size).logits[0], expected)
    tokens = [
        fed(model, PROMPT, block=block).complete(21, Sampling(1.0)).tokens for block in (4, 64)
    ]
    np.testing.assert_array_equal(*tokens)


def test_prompts_of_different_lengths_share_a_batch(model):
    together = fed(model, RAGGED, chunk_size=16)
    for b, prompt in enumerate(RAGGED):
        alone = fed(model, prompt)
        assert_close(together.logits[b], alone.logits[0])
        assert together.position[b] == alone.position[0] == len(prompt)
    tokens = generate(model, RAGGED, steps=12, chunk_size=16)
    for b, prompt in enumerate(RAGGED):
        np.testing.assert_array_equal(tokens[b], generate(model, prompt, steps=12))


def test_going_on_from_a_state_with_different_lengths(model, recompute):
    session = fed(model, RAGGED, MORE, chunk_size=16, block=8)
    for b, row in enumerate(RAGGED):
        assert_close(session.logits[b], recompute(np.concatenate([row, MORE[b]]))[-1])
        assert session.position[b] == len(row) + len(MORE[b])
    session.feed([5])  # the states waited too, not only the logits
    for b, row in enumerate(RAGGED):
        assert_close(session.logits[b], recompute(np.concatenate([row, MORE[b], [5]]))[-1])


def test_one_row_more_goes_to_every_row_of_the_session(model, recompute):
    session = fed(model, RAGGED, PROMPT)
    assert_close(session.logits[2], recompute(np.concatenate([RAGGED[2], PROMPT]))[-1])


def test_a_stream_of_pieces_reads_as_the_whole(model):
    cuts = [PROMPT[:5], PROMPT[5:5], PROMPT[5:38], PROMPT[38:]]
    streamed = generate(model, iter(cuts), steps=9, chunk_size=16)
    np.testing.assert_array_equal(streamed, generate(model, PROMPT, steps=9))


def test_a_state_of_the_model_itself_can_be_continued_and_is_left_as_it_was(model):
    _, state = model(PROMPT[None, :30])
    before = jax.tree.map(np.array, state)
    tokens = generate(model, PROMPT[30:], steps=9, state=state)
    np.testing.assert_array_equal(tokens, generate(model, PROMPT, steps=9))
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_a_row_draws_alone_what_it_draws_in_a_batch(model):
    sampling = Sampling(temperature=1.5, top_k=10)
    together = fed(model, [RAGGED[1], RAGGED[1][:9]]).complete(30, sampling, seed=5).tokens
    alone = fed(model, RAGGED[1]).complete(30, sampling, seed=5).tokens
    np.testing.assert_array_equal(together[0], alone[0])


def test_copies_of_a_prompt_and_other_seeds_draw_differently(model):
    tokens = generate(model, [PROMPT, PROMPT], steps=20, temperature=1.0)
    assert (tokens[0] != tokens[1]).any()
    assert (generate(model, PROMPT, steps=20, temperature=1.0, seed=1) != tokens[0]).any()


def test_a_row_ends_at_its_stop_token_and_stays_there(model):
    free = generate(model, RAGGED, steps=30, temperature=1.0)
    stop = int(free[1, 4])
    lengths = [int((row == stop).argmax()) + 1 if stop in row else 30 for row in free]
    session = fed(model, RAGGED, block=8)
    done = session.complete(30, Sampling(1.0), stop=stop)
    np.testing.assert_array_equal(done.lengths, lengths)
    assert done.finish[1] == "stop"
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(done.tokens[b, :n], free[b, :n])
        assert (done.tokens[b, n:] == stop).all()
        assert session.position[b] == len(RAGGED[b]) + n
    alone = fed(model, np.concatenate([RAGGED[1], free[1, : lengths[1]]]))
    assert_close(session.logits[1], alone.logits[0])
    assert session.complete(5, Sampling(1.0), stop=stop).lengths[1] == 0
    session.feed(PROMPT[:3])
    alone.feed(PROMPT[:3])
    assert_close(session.logits[1], alone.logits[0])
    assert session.complete(5).lengths[1] == 5


def test_the_callback_sees_every_token_once_and_in_order(model):
    seen = []
    tokens = generate(model, PROMPT, steps=150, stream=lambda block: seen.append(block.tokens[0]))
    assert len(seen) > 1
    np.testing.assert_array_equal(np.concatenate(seen), tokens)


def test_a_row_whose_logits_are_not_finite_ends_alone(model):
    clean = generate(model, [PROMPT, PROMPT[:9]], steps=9)
    session = fed(model, [PROMPT, PROMPT[:9]])
    state = jax.tree.map(np.array, session.state)
    state[0].mixer.memory[:, 0] = np.nan
    session = Session(model, state)
    session.feed([PROMPT[:1], clean[1, :1]])
    done = session.complete(8)
    assert done.finish == ("nan", "length") and done.lengths.tolist() == [0, 8]
    np.testing.assert_array_equal(done.tokens[1], clean[1, 1:])
    with pytest.raises(ModelError, match=r"rows \[0\] are not finite"):
        generate(model, [PROMPT[:1], clean[1, :1]], steps=8, state=state)


def test_decoding_needs_no_more_memory_for_more_steps(model):
    session = fed(model, PROMPT)

    def memory(block):
        row = np.zeros(1, np.int32)
        keys = jax.vmap(jax.random.key)(row)
        structure, params = jax.tree.structure(model), session._params
        lowered = decode.decode.lower(
            structure, params, session._carry, row, row, row, keys, row, {}, top_k=None, block=block
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(4096) - memory(8) <= 2 * 4 * 4096  # the tokens themselves, and one copy


@pytest.mark.parametrize(
    ("prompt", "options", "error", "said"),
    [
        ([], {}, DataError, "Row 0 of the prompt is empty"),
        ([[1, 2], []], {}, DataError, "Row 1 of the prompt is empty"),
        (iter([]), {}, DataError, "The prompt is empty"),
        ([1, VOCAB], {}, DataError, f"the id {VOCAB} at index 1, outside"),
        ([-1], {}, DataError, "the id -1 at index 0, outside"),
        (iter([[1, 2, 99]]), {}, DataError, "the id 99 at index 2, outside"),
        ("text", {}, DataError, "not a row of token ids"),
        ([1.5], {}, DataError, "not a row of token ids"),
        ([1, [2, 3]], {}, DataError, "not a row of token ids"),
        ([1], {"steps": 0}, ConfigError, "steps must be at least 1, not 0"),
        ([1], {"temperature": -1.0}, ConfigError, "temperature must be 0"),
        ([1], {"top_p": 2.0}, ConfigError, "top_p must be above 0"),
        ([1], {"seed": -1}, ConfigError, "seed must be between 0"),
        ([1], {"stop": 300}, DataError, "stop holds the id 300"),
        ([1], {"chunk_size": 0}, ConfigError, "chunk_size=0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(model, prompt, options, error, said):
    with pytest.raises(error, match=said):
        generate(model, prompt, **{"steps": 4, **options})


def test_a_state_that_does_not_fit_is_refused(model):
    with pytest.raises(
        ModelError, match=r"0.mixer.memory is float32\[2, 1, 8\], not float32\[2, 1, 16\]"
    ):
        generate(model, [1], steps=1, state=tiny(d_model=8).init_state(1))
    with pytest.raises(ModelError, match="other parts"):
        generate(model, [1], steps=1, state=model.init_state(1)[:1])
    with pytest.raises(DataError, match="has 2 rows but the session holds 3"):
        generate(model, [[1], [2]], steps=1, state=model.init_state(3))


def test_more_tokens_than_the_model_holds_are_refused_before_any_work():
    model = tiny(max_length=24)
    assert generate(model, PROMPT[:4], steps=20).shape == (20,)
    with pytest.raises(ModelError, match="make 25 but the model's max_length is 24"):
        generate(model, PROMPT[:5], steps=20)
    session = fed(model, PROMPT[:20])
    with pytest.raises(ModelError, match="make 25 tokens but the model's max_length is 24"):
        session.feed(PROMPT[:5])
    with pytest.raises(ModelError, match="max_length"):
        session.generate(5)
    assert session.complete(4).lengths[0] == 4


def test_a_hybrid_of_real_mixers_decodes_ragged_prompts_as_it_recomputes_them():
    pattern = (mixer_config("gla"), mixer_config("mamba2"), mixer_config("attention", window=8))
    config = lm.Config(vocab=VOCAB, d_model=16, pattern=pattern, tie_embeddings=False)
    model = config.build(rngs=nnx.Rngs(0))
    session = fed(model, RAGGED, chunk_size=16)
    tokens = session.complete(9).tokens
    longest = max(len(row) for row in RAGGED) + 9
    rows = [np.concatenate([row, t]) for row, t in zip(RAGGED, tokens, strict=True)]
    padded = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    whole = np.asarray(jax.jit(lambda tokens: model(tokens)[0])(padded))
    for b, row in enumerate(rows):
        n = len(row)
        np.testing.assert_array_equal(tokens[b], whole[b, n - 10 : n - 1].argmax(-1))
        assert_close(session.logits[b], whole[b, n - 1])
