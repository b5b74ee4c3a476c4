"""Tasks of recall and copying ask what they say: answers are found again, token by token."""

import itertools

import numpy as np
import pytest

from seqlab.tasks import IGNORE, task_config
from tests.task_rows import rows


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


def test_forgetting_asks_for_the_last_value_of_a_key():
    for tokens, asked in rows("mqar_forgetting", vocab=64, length=48, pairs=6, updates=3):
        context = list(zip(tokens[0:18:2], tokens[1:18:2], strict=True))
        value = {}
        for key, new in context:
            assert value.get(key) != new
            value[key] = new
        assert len(value) == len({key for key, _ in context[:6]}) == 6
        assert len({key for key, _ in context[6:]}) == 3
        assert sorted(tokens[t] for t in asked) == sorted(value)
        assert all(label == value[tokens[t]] for t, label in asked.items())


def test_compositional_keys_are_a_grid_in_which_no_token_tells_the_value():
    for tokens, asked in rows("mqar_compositional", vocab=60, length=66, pairs=9):
        triples = list(zip(tokens[0:27:3], tokens[1:27:3], tokens[2:27:3], strict=True))
        value = {(a, b): v for a, b, v in triples}
        firsts, seconds = {a for a, _ in value}, {b for _, b in value}
        assert len(firsts) == len(seconds) == 3 and len(value) == len(set(value.values())) == 9
        assert max(firsts) < 20 <= min(seconds) and max(seconds) < 40 <= min(value.values())
        assert sorted((tokens[t - 1], tokens[t]) for t in asked) == sorted(value)
        assert all(label == value[tokens[t - 1], tokens[t]] for t, label in asked.items())


def test_selective_copying_says_the_data_in_order():
    for tokens, asked in rows("selective_copying", length=40, tokens=6):
        data = [x for x in tokens[:-6] if x != 0]
        assert len(data) == 6 and set(data) <= set(range(1, 15)) and tokens[-6:] == [15] * 6
        assert [asked[t] for t in range(34, 40)] == data and len(asked) == 6
    for tokens, asked in rows("mad_selective_copying", length=40, tokens=6):
        data = [x for x in tokens[:33] if x != 14]
        assert len(data) == 6 and set(data) <= set(range(14)) and tokens[33:] == [15] + [14] * 6
        assert [asked[t] for t in range(34, 40)] == data and len(asked) == 6


def test_induction_heads_asks_what_came_after_the_special_token():
    examples = rows("induction_heads", length=12, count=500)
    places = set()
    for tokens, asked in examples:
        place = tokens.index(15)
        places.add(place)
        assert tokens.count(15) == 2 and asked == {11: tokens[place + 1]} and tokens[11] == 15
    assert places == set(range(10))


def spelt(tokens, letters=26):
    """The ids of a string task as text."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters] + "$|.*"
    return "".join(alphabet[x] for x in tokens)


def said(tokens, asked, letters=26):
    """What is read up to the first label, and what the labels then say, for every question."""
    starts = [t for t in sorted(asked) if t - 1 not in asked]
    for start in starts:
        end = start
        while end in asked:
            assert asked[end] == (tokens[end + 1] if end + 1 < len(tokens) else asked[end])
            end += 1
        read = spelt(tokens[: start + 1], letters)
        yield read[read.rindex("$") :], spelt((asked[t] for t in range(start, end)), letters)


@pytest.mark.parametrize("several", [True, False])
def test_copy_says_the_string_again(several):
    sizes = set()
    for tokens, asked in rows("copy", several=several, length=64):
        for read, answer in said(tokens, asked):
            assert read[0] == "$" and read[-1] == "|" and answer == read[1:-1] + "."
            sizes.add(len(answer) - 1)
        assert several or spelt(tokens).rstrip("*") == read + answer
    assert sizes == set(range(5, 21))


@pytest.mark.parametrize("answer", [None, 2])
@pytest.mark.parametrize("where", ["before", "after"])
def test_ngram_lookup_says_what_follows_the_only_such_gram(where, answer):
    fields = {"letters": 5, "gram": 2, "shortest": 8, "longest": 12, "answer": answer}
    for tokens, asked in rows("ngram_lookup", asked=where, **fields):
        for read, answered in said(tokens, asked, letters=5):
            one, two = read[1:].split("|")[:2]
            gram, string = (one, two) if where == "before" else (two, one)
            begins = [i for i in range(len(string)) if string.startswith(gram, i)]
            assert len(gram) == 2 and len(begins) == 1
            rest = string[begins[0] + 2 :]
            assert answered == rest[:answer] + "." and len(rest) >= (answer or 1)


def test_the_phonebook_asks_for_a_number_it_has_shown():
    for tokens, asked in rows("phonebook", entries=5):
        *lines, question = bytes(tokens).decode("ascii").splitlines()
        book = dict(line.split(": ") for line in lines[:5])
        assert len(book) == 5 and lines[5] in lines[:5] and lines[6] in lines[:5]
        name, number = question.split(": ")
        assert name not in (lines[5].split(":")[0], lines[6].split(":")[0])
        assert len(book[name]) == 10 and book[name][0] in "6789" and book[name][:9] == number
        assert "".join(chr(asked[t]) for t in sorted(asked)) == book[name]
        assert sorted(asked) == list(range(len(tokens) - 10, len(tokens)))


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_the_needle_is_once_in_the_haystack_at_its_depth(depth):
    starts = set()
    for tokens, asked in rows("needle", vocab=64, length=100, values=3, depth=depth, count=400):
        start = tokens.index(63)
        assert tokens.count(63) == 2 and tokens[96:] == tokens[start : start + 4]
        assert [asked[t] for t in (97, 98, 99)] == tokens[start + 2 : start + 5]
        assert len(asked) == 3 and start + 5 <= 96
        starts.add(start)
    if depth is None:
        assert len(starts) == 40 and (min(starts), max(starts)) == (0, 91)
    else:
        assert starts == {round(91 * depth)}


@pytest.mark.parametrize("first, second", [(3, 12), (12, 3), (1, 1)])
def test_two_sets_share_one_element_which_is_asked(first, second):
    places = set()
    for tokens, asked in rows("set_disjointness", first=first, second=second, count=400):
        assert [tokens[0], tokens[first + 1], tokens[-1]] == [1, 2, 3]
        one, two = tokens[1 : first + 1], tokens[first + 2 : -1]
        assert len(set(one)) == first and len(set(two)) == second and min(one + two) >= 4
        (both,) = set(one) & set(two)
        assert asked == {first + second + 2: both}
        places.add((one.index(both), two.index(both)))
    assert len(places) == first * second


def test_recall_of_mad_asks_for_values_of_keys_that_came():
    for name, fields in (("mad_in_context_recall", {}), ("mad_noisy_recall", {"fraction": 0.3})):
        half, clean = 8, 16
        for tokens, asked in rows(name, length=32, **fields):
            value, answers = {}, {}
            for t in range(0, 32, 2):
                key, then = tokens[t : t + 2]
                if key >= clean:
                    assert then >= clean and t < 30
                    continue
                assert key < half <= then < clean
                if key in value:
                    assert value[key] == then
                    answers[t] = then
                value[key] = then
            assert asked == answers and 30 in asked


def test_noise_of_mad_comes_as_often_as_is_said():
    inputs, _ = task_config("mad_noisy_recall", length=128, fraction=0.6).examples(2000, 0)
    noisy = inputs[:, ::2] >= 16
    assert abs(noisy.mean() - 0.6 * 62 / 64) < 0.005  # one pair and the last are kept
    assert not noisy.all(1).any() and not noisy[:, -1].any()


@pytest.mark.parametrize("name", ["mad_in_context_recall", "mad_noisy_recall", "mad_fuzzy_recall"])
def test_training_of_mad_asks_for_every_next_id(name):
    inputs, labels = task_config(name, targets="all").examples(20, 0)
    assert np.array_equal(labels[:, :-1], inputs[:, 1:]) and (labels[:, -1] == IGNORE).all()


def test_fuzzy_recall_asks_for_whole_values_of_keys_that_came():
    for tokens, asked in rows("mad_fuzzy_recall", vocab=33, length=48):
        ids = [x for x in tokens if x != 32]
        assert tokens == [32] * (48 - len(ids)) + ids
        t, value, answers = 48 - len(ids), {}, {}
        for is_key, motif in itertools.groupby(ids, lambda x: x < 16):
            motif = tuple(motif)
            assert len(set(motif)) == len(motif) <= 3
            if is_key:
                assert len(motif) == 3
                key = motif
            else:
                if key in value:
                    assert value[key] == motif
                    answers |= {t + i - 1: x for i, x in enumerate(motif)}
                value[key] = motif
            t += len(motif)
        assert asked == answers and 46 in asked


def test_memorisation_asks_one_fixed_dictionary():
    known = {}
    for seed in (0, 2**31):
        for tokens, asked in rows("mad_memorization", seed=seed):
            assert tokens[1::2] == [63] * 16 and sorted(asked) == list(range(1, 32, 2))
            for t, value in asked.items():
                assert known.setdefault(tokens[t - 1], value) == value
    assert set(known) == set(range(31)) and len(set(known.values())) == 31
    assert set(known.values()) <= set(range(31, 63))


def test_compression_asks_for_all_that_was_read_in_order():
    for tokens, asked in rows("mad_compression", tokens=7):
        assert tokens[7:] == [15] * 7 and max(tokens[:7]) < 15
        assert [asked[t] for t in range(7, 14)] == tokens[:7] and len(asked) == 7
