"""Every task asks what its definition says: answers are worked out again, one token at a time."""

import dataclasses

import numpy as np
import pytest

from seqlab import settings
from seqlab.errors import ConfigError
from seqlab.tasks import IGNORE, accuracy, protocol, protocols, task_config, tasks

ALL = pytest.mark.parametrize("name", tasks())


def rows(name, count=64, seed=3, **fields):
    """Examples of a task as lists of ints, one pair (inputs, {position: label}) a row."""
    inputs, labels = task_config(name, **fields).examples(count, seed)
    asked = [{t: row[t] for t in np.flatnonzero(row != IGNORE).tolist()} for row in labels]
    return list(zip(inputs.tolist(), asked, strict=True))


@ALL
def test_examples_are_ids_of_the_vocabulary_and_every_row_asks_something(name):
    config = task_config(name)
    inputs, labels = config.examples(200, 0)
    assert inputs.dtype == labels.dtype == np.int32
    assert inputs.shape == labels.shape == (200, config.length)
    assert inputs.min() >= 0 and inputs.max() < config.vocab
    asked = labels[labels != IGNORE]
    assert asked.min() >= 0 and asked.max() < config.vocab
    assert (labels != IGNORE).any(1).all()


@ALL
def test_the_same_seed_gives_the_same_examples_and_another_seed_others(name):
    config = task_config(name)
    once, again, other = (config.examples(16, seed) for seed in (7, 7, 8))
    assert np.array_equal(once.inputs, again.inputs)
    assert np.array_equal(once.labels, again.labels)
    assert not np.array_equal(once.inputs, other.inputs)


@ALL
def test_what_is_tested_is_never_what_was_trained_on(name):
    trained, tested = set(), set()
    for record, part in ((trained, "training"), (tested, "testing")):

        class Spy:
            def examples(self, count, seed, record=record):
                record.add(seed)

        spies = dataclasses.replace(
            protocol(name),
            train=((Spy(), 1),) * len(protocol(name).train),
            test=(("", Spy(), 1),) * len(protocol(name).test),
        )
        for seed in (0, 1, 2**23 - 1):
            getattr(spies, part)(seed)
    assert trained.isdisjoint(tested) and len(trained) == 3 * len(protocol(name).train)


@ALL
def test_configs_and_protocols_are_plain_json_and_back(name):
    config = task_config(name)
    assert settings.read(type(config), settings.plain(config)) == config
    for known in protocols(name).values():
        assert known.vocab >= 2 and known.length >= max(c.length for c, _ in known.train)


def test_accuracy_is_a_mean_over_examples_of_what_each_asks():
    labels = np.array([[1, 2, IGNORE, IGNORE], [3, IGNORE, IGNORE, IGNORE], [IGNORE] * 4])
    said = np.array([[1, 0, 9, 9], [3, 9, 9, 9], [9] * 4])
    assert accuracy(said, labels) == (0.75, 0.5)
    with pytest.raises(ConfigError, match="No example asks anything"):
        accuracy(said, np.full_like(labels, IGNORE))


@pytest.mark.parametrize(
    "ask, sentence",
    [
        (lambda: task_config("mqarr"), "There is no task 'mqarr': did you mean 'mqar'?"),
        (lambda: task_config("mqar", pair=3), "mqar has no field 'pair': did you mean 'pairs'?"),
        (lambda: task_config("mqar", pairs=0), "pairs = 0 is wrong"),
        (lambda: protocol("mqar", "zoology_recal"), "did you mean 'zoology_recall'?"),
        (lambda: protocol("mqar").training(-1), "The seed -1 is not between 0 and"),
        (lambda: task_config("mqar", pairs=17), "17 pairs and their queries need length >= 68"),
        (lambda: task_config("mqar", vocab=16), "8 pairs need vocab >= 18, not 16"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(ask, sentence):
    with pytest.raises(ConfigError) as error:
        ask()
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_mqar_asks_every_key_once_for_the_value_beside_it(filled, passes):
    sizes = {"vocab": 64, "length": 48, "pairs": 6}
    for tokens, asked in rows("mqar", **sizes, passes=passes, random_non_queries=filled):
        context = tokens[: 12 * passes]
        assert context == context[:12] * passes
        value = dict(zip(context[0:12:2], context[1:12:2], strict=True))
        assert len(value) == len(set(value.values())) == 6
        assert set(value) <= set(range(1, 32)) and set(value.values()) <= set(range(32, 64))
        assert sorted(tokens[t] for t in asked) == sorted(value)
        assert all(label == value[tokens[t]] and t % 2 == 0 for t, label in asked.items())
        rest = [x for t, x in enumerate(tokens[12 * passes :], 12 * passes) if t not in asked]
        assert any(rest) == filled


def test_queries_of_mqar_come_soon_as_its_power_law_says():
    """The first of n draws without replacement falls on slot g with p ~ (g + 1)^(power - 1)."""
    _, labels = task_config("mqar", length=64, pairs=1, power=0.01).examples(20_000, 0)
    slots = (np.argmax(labels != IGNORE, axis=1) - 2) // 2
    p = np.arange(1, 32) ** (0.01 - 1)
    np.testing.assert_allclose(np.bincount(slots, minlength=31) / 20_000, p / p.sum(), atol=0.012)
