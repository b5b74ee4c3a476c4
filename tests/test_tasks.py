"""What all tasks have in common: their examples, seeds, protocols, names and mistakes."""

import dataclasses

import numpy as np
import pytest

from seqlab import settings
from seqlab.errors import ConfigError
from seqlab.tasks import IGNORE, accuracy, protocol, protocols, task_config, tasks

ALL = pytest.mark.parametrize("name", tasks())


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
        (lambda: task_config("mqar_forgetting", updates=9), "updates=9 is more than there are"),
        (lambda: task_config("mqar_forgetting", pairs=15), "need length >= 68, not 64"),
        (lambda: task_config("mqar_compositional", pairs=8), "pairs=8 is not a square, such as 4"),
        (lambda: task_config("mqar_compositional", vocab=24), "9 pairs need vocab >= 27, not 24"),
        (lambda: task_config("selective_copying", tokens=33), "need length >= 66, not 64"),
        (lambda: task_config("mad_selective_copying", tokens=32), "need length >= 65, not 64"),
        (lambda: task_config("induction_heads", length=2), "length = 2 is wrong"),
        (lambda: task_config("copy", longest=31), "strings of 31 letters need length >= 65"),
        (lambda: task_config("copy", shortest=21), "shortest=21 is above longest=20"),
        (
            lambda: task_config("ngram_lookup", shortest=3),
            "is not between 4, a gram and",
        ),
        (lambda: task_config("ngram_lookup", letters=2), "2 letters make too few grams of 3"),
        (lambda: task_config("phonebook", entries=2), "entries = 2 is wrong"),
        (lambda: task_config("group_words", group="Q8"), "There is no group 'Q8': write Z60"),
        (lambda: task_config("group_words", group="S7"), "S7 has more than 1024 elements"),
        (lambda: task_config("group_words", group="S5xS5"), "14400 elements has more than 1024"),
        (lambda: task_config("group_words", group="Z60", moved=2), "no element of Z60 moves"),
        (lambda: task_config("group_words", spread=5), "length=32 is not divisible by spread=5"),
        (lambda: task_config("parity", shortest=25), "shortest=25 is above length=24"),
        (lambda: task_config("modular_arithmetic", length=3), "one of 2, 4, 6, ..."),
        (lambda: task_config("needle", values=32), "need length >= 67, not 64"),
        (lambda: task_config("needle", depth=2), "depth = 2 is wrong"),
        (lambda: task_config("set_disjointness", vocab=23), "need vocab >= 24, not 23"),
        (lambda: task_config("mad_noisy_recall", vocab=17), "need vocab >= 18, not 17"),
        (lambda: task_config("mad_fuzzy_recall", motif=8), "need vocab >= 17, not 16"),
        (lambda: task_config("mad_fuzzy_recall", length=11), "need length >= 12, not 11"),
        (lambda: task_config("repeat_previous", back=22), "need length > 66, not 64"),
        (lambda: task_config("repeat_first", again=64), "again=64 is not below length=64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(ask, sentence):
    with pytest.raises(ConfigError) as error:
        ask()
    assert sentence in str(error.value) and "\n" not in str(error.value)
