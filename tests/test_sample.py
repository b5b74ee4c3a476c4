"""Sampling: the filters are those of the reference implementation, and rows are independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab import settings
from seqlab.conformance.tolerance import assert_close
from seqlab.errors import ConfigError
from seqlab.infer.sample import Sampling, filtered, row_keys, sample

LOGITS = 3 * np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 500, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_p": 1e-6},
]


def reference(temperature, top_k=None, top_p=None, min_p=None):
    transformers = pytest.importorskip("transformers.generation.logits_process")
    torch = pytest.importorskip("torch")
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p and top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    scores = torch.tensor(LOGITS)
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize("choices", SETTINGS, ids=str)
def test_filtered_distributions_are_those_of_transformers(choices):
    sampling = Sampling(**choices)
    ours = jax.nn.softmax(filtered(jnp.asarray(LOGITS), sampling.numbers, sampling.top_k))
    theirs = reference(**choices)
    np.testing.assert_array_equal(np.asarray(ours) > 0, theirs > 0)
    assert_close(ours, theirs)


def test_draws_follow_the_filtered_distribution():
    sampling = Sampling(temperature=1.0, top_k=3)
    n = 20_000
    draws = np.asarray(sample(jnp.tile(LOGITS[:1], (n, 1)), row_keys(0, n), sampling))
    expected = reference(1.0, top_k=3)[0]
    observed = np.bincount(draws, minlength=50) / n
    assert abs(observed - expected).max() < 5 * 0.5 / n**0.5  # five standard deviations at most
    assert observed[expected == 0].sum() == 0


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    tokens = sample(jnp.asarray(LOGITS), row_keys(0, 4), Sampling(top_k=2, top_p=0.1))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))
    assert tokens.dtype == jnp.int32


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    tokens = sample(jnp.asarray(LOGITS), row_keys(3, 4), Sampling(temperature=1e-38, top_p=0.9))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


def test_a_row_draws_the_same_alone_and_in_a_batch():
    sampling, keys = Sampling(temperature=1.0, top_p=0.95), row_keys(7, 4)
    together = sample(jnp.asarray(LOGITS), keys, sampling)
    alone = [sample(LOGITS[b : b + 1], keys[b : b + 1], sampling)[0] for b in range(4)]
    np.testing.assert_array_equal(together, np.array(alone))
    assert (row_keys(7, 2) == keys[:2]).all()


def test_nan_in_one_row_leaves_the_others_alone():
    spoiled = jnp.asarray(LOGITS).at[1].set(jnp.nan)
    for sampling in (Sampling(), Sampling(1.0, 9, 0.9, 0.01)):
        clean = sample(jnp.asarray(LOGITS), row_keys(0, 4), sampling)
        tokens = sample(spoiled, row_keys(0, 4), sampling)
        np.testing.assert_array_equal(np.delete(tokens, 1), np.delete(clean, 1))
        assert 0 <= tokens[1] < 50


def test_another_temperature_is_the_same_program():
    traces = []

    @jax.jit
    def program(logits, numbers):
        traces.append(numbers)
        return filtered(logits, numbers, 3)

    for temperature in (0.5, 0.9):
        program(LOGITS, Sampling(temperature, top_p=temperature).numbers)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"temperature": "warm"}, "temperature = 'warm' is wrong"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_sentence(wrong, said):
    with pytest.raises(ConfigError, match=said):
        settings.read(Sampling, wrong, where="generate")
