"""Tasks of tracking a state ask what they say: answers are worked out again, step by step."""

import ast
import itertools
import operator

import numpy as np
import pytest

from seqlab.tasks import IGNORE, task_config
from tests.task_rows import rows


def permuted(name, element):
    """An element of a group as a function of points, worked out without its table."""
    points = []
    for factor in reversed(name.split("x")):
        kind, n = factor[0], int(factor[1:])
        if kind == "Z":
            every = [tuple((i + s) % n for i in range(n)) for s in range(n)]
        else:
            every = list(itertools.permutations(range(n)))
        if kind == "A":
            odd = lambda p: sum(a > b for a, b in itertools.combinations(p, 2)) % 2
            every = [p for p in every if not odd(p)]
        element, which = divmod(element, len(every))
        points = [every[which], *points]
    assert element == 0
    return points


@pytest.mark.parametrize("group, order", [("Z60", 60), ("S4", 24), ("A5", 60), ("A4xZ5", 60)])
def test_group_words_ask_for_the_product_so_far(group, order):
    config = task_config("group_words", group=group, length=12)
    assert config.vocab == order
    inputs, labels = config.examples(40, 0)
    assert len(np.unique(inputs)) > 0.8 * min(order, 480)
    for tokens, asked in zip(inputs.tolist(), labels.tolist(), strict=True):
        product = permuted(group, 0)
        for element, label in zip(tokens, asked, strict=True):
            parts = zip(product, permuted(group, element), strict=True)
            product = [tuple(b[i] for i in a) for a, b in parts]
            assert product == permuted(group, label)


def test_s5_has_120_elements_and_ten_swaps():
    assert task_config("group_words", group="S5").vocab == 120
    swaps = task_config("group_words", group="S5", moved=2, length=40)
    inputs, labels = swaps.examples(50, 0)
    assert len(np.unique(inputs)) == 11 and len(np.unique(labels)) > 90
    for element in np.unique(inputs).tolist():
        (points,) = permuted("S5", element)
        assert sum(a != b for a, b in enumerate(points)) in (0, 2)


def test_spread_words_ask_at_the_last_blank_after_an_element():
    plain = task_config("group_words", group="S3", length=8).examples(20, 0)
    inputs, labels = task_config("group_words", group="S3", length=24, spread=3).examples(20, 0)
    assert np.array_equal(inputs[:, ::3], plain.inputs)
    assert np.array_equal(labels[:, 2::3], plain.labels)
    assert (inputs[:, 1::3] == 6).all() and (inputs[:, 2::3] == 6).all()
    assert (labels[:, 0::3] == IGNORE).all() and (labels[:, 1::3] == IGNORE).all()


@pytest.mark.parametrize("shortest, asked_bits", [(None, None), (3, 1), (None, 8), (5, 4)])
def test_parity_counts_the_ones(shortest, asked_bits):
    sizes = set()
    for tokens, asked in rows("parity", length=12, shortest=shortest, asked=asked_bits, count=300):
        bits = [x - 1 for x in tokens if x]
        assert tokens[len(bits) :] == [0] * (12 - len(bits))
        first = max(0, len(bits) - (asked_bits or 12))
        assert asked == {t: 1 + sum(bits[: t + 1]) % 2 for t in range(first, len(bits))}
        sizes.add(len(bits))
    assert sizes == set(range(shortest or 12, 13))


@pytest.mark.parametrize("brackets", [False, True])
def test_modular_arithmetic_asks_for_the_value_python_gives(brackets):
    symbols = {1: "+", 2: "-", 3: "*", 10: "(", 11: ")"} | {5 + d: str(d) for d in range(5)}
    sizes = set()
    for tokens, asked in rows("modular_arithmetic", length=26, brackets=brackets, count=300):
        end = tokens.index(4)
        value = arithmetic("".join(symbols[x] for x in tokens[:end]))
        assert asked == {end: 5 + value % 5} and not any(tokens[end + 1 :])
        sizes.add(end + 1)
    assert sizes == (set(range(6, 27, 4)) if brackets else set(range(4, 27, 2)))


def arithmetic(text):
    """The value of an expression of digits, by Python's own grammar."""
    work = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        return work[type(node.op)](value(node.left), value(node.right))

    return value(ast.parse(text, mode="eval").body)


def test_cards_are_asked_within_their_episode():
    for tokens, asked in rows("repeat_previous", back=3, again=4, length=40):
        episode, answers = [], {}
        for t, token in enumerate(tokens):
            episode = [token - 4] if token >= 4 else [*episode, token]
            if len(episode) > 3:
                answers[t] = episode[-4]
        assert asked == answers and sum(x >= 4 for x in tokens) == 5
    for tokens, asked in rows("repeat_first", again=4, length=40):
        first = None
        for t, token in enumerate(tokens):
            first = token - 4 if token >= 4 else first
            assert asked[t] == first
        assert tokens[0] >= 4 and sum(x >= 4 for x in tokens) == 5
