"""A session goes on bit for bit where it stopped: in blocks, in copies, and through a file."""

import jax
import numpy as np
import pytest

from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError, ModelError
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Session
from tests.leaky import VOCAB, tiny

PROMPTS = [np.arange(n) * 7 % VOCAB for n in (40, 9)]
SAMPLED = Sampling(temperature=1.2, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def session(model):
    session = Session(model, block=16)
    session.feed(PROMPTS)
    return session


def assert_same_bits(a: Session, b: Session):
    jax.tree.map(np.testing.assert_array_equal, a.state, b.state)
    for name in ("logits", "position", "finish"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_saved_and_resumed_is_bitwise_as_if_it_had_never_stopped(
    model, session, tmp_path, sampling
):
    whole = session.fork()
    uninterrupted = whole.complete(50, sampling, seed=2).tokens
    first = session.complete(19, sampling, seed=2).tokens
    session.save(tmp_path / "s.safetensors")
    resumed = Session.load(model, tmp_path / "s.safetensors", block=16)
    assert_same_bits(resumed, session)
    rest = resumed.complete(31, sampling, seed=2).tokens
    np.testing.assert_array_equal(np.concatenate([first, rest], 1), uninterrupted)
    assert_same_bits(resumed, whole)


def test_a_row_that_ended_has_ended_in_the_file_too(model, session, tmp_path):
    stop = int(session.fork().complete(5, SAMPLED).tokens[0, 2])
    session.complete(5, SAMPLED, stop=stop)
    session.save(tmp_path / "s")
    resumed = Session.load(model, tmp_path / "s")
    assert resumed.finish[0] == "stop"
    assert resumed.complete(3, SAMPLED, stop=stop).lengths[0] == 0


def test_rows_can_be_given_steps_of_their_own(session):
    free = session.fork().complete(40, SAMPLED).tokens
    blocks = list(session.generate([21, 3], SAMPLED))
    assert sum(block.counts for block in blocks).tolist() == [21, 3]
    first = np.concatenate([b.tokens[0, : b.counts[0]] for b in blocks])
    np.testing.assert_array_equal(first, free[0, :21])
    assert session.position.tolist() == [61, 12]


def test_a_generation_can_be_left_between_blocks(session):
    whole = session.fork().complete(40, SAMPLED).tokens
    block = next(session.generate(40, SAMPLED))
    rest = session.complete(40 - block.tokens.shape[1], SAMPLED).tokens
    np.testing.assert_array_equal(np.concatenate([block.tokens, rest], 1), whole)


def test_forks_are_independent_and_draw_differently(session):
    fork = session.fork(3)
    assert fork.batch == 6 and fork.position.tolist() == [40] * 3 + [9] * 3
    before = session.logits
    tokens = fork.complete(20, SAMPLED).tokens
    assert len({row.tobytes() for row in tokens[:3]}) == 3
    np.testing.assert_array_equal(session.logits, before)
    greedy = session.fork(2).complete(9).tokens
    np.testing.assert_array_equal(greedy[::2], greedy[1::2])
    np.testing.assert_array_equal(greedy[::2], session.complete(9).tokens)
    with pytest.raises(ConfigError, match="at least 1 copy, not 0"):
        session.fork(0)


def test_the_state_is_that_of_the_model_after_every_token(model, session):
    done = session.complete(11)
    for b, prompt in enumerate(PROMPTS):
        _, state = model(np.concatenate([prompt, done.tokens[b]])[None])
        for ours, theirs in zip(
            jax.tree.leaves(session.state), jax.tree.leaves(state), strict=True
        ):
            assert_close(ours[:, b], theirs[:, 0])


def test_a_session_that_has_read_nothing_says_so(model, tmp_path):
    for use in (
        lambda s: s.generate(3),
        lambda s: s.fork(),
        lambda s: s.save(tmp_path / "s"),
        lambda s: s.logits,
    ):
        with pytest.raises(ModelError, match="has read nothing yet"):
            use(Session(model))


def test_the_state_file_of_another_model_is_refused(session, tmp_path):
    session.save(tmp_path / "s")
    with pytest.raises(ModelError, match="saved by another model"):
        Session.load(tiny(seed=1), tmp_path / "s")


def test_a_file_that_is_no_whole_state_file_is_refused(model, session, tmp_path):
    path = tmp_path / "s"
    session.save(path)
    content = path.read_bytes()
    damage = {
        "truncated": content[:-10],
        "cut in the header": content[:20],
        "empty": b"",
        "text": b"To be, or not to be" * 9,
        "one bit flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    }
    for how, wrong in damage.items():
        path.write_bytes(wrong)
        with pytest.raises(ModelError, match="is damaged or no state file") as refusal:
            Session.load(model, path)
        assert "\n" not in str(refusal.value), how


def test_weights_and_missing_files_are_no_state_files(model, tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "weights")
    with pytest.raises(ModelError, match="is no saved session"):
        Session.load(model, tmp_path / "weights")
    with pytest.raises(ModelError, match="cannot be read"):
        Session.load(model, tmp_path / "absent")
    with pytest.raises(ModelError, match="cannot be read"):
        Session.load(model, tmp_path)


def test_a_place_that_cannot_be_written_keeps_the_session_and_leaves_nothing(session, tmp_path):
    with pytest.raises(ModelError, match="cannot be written"):
        session.save(tmp_path / "no" / "such" / "folder")
    assert list(tmp_path.iterdir()) == []
    assert session.complete(2).lengths.tolist() == [2, 2]
