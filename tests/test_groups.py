"""Sequences of many lengths on groups of devices: against every possible assignment."""

import itertools

import numpy as np
import pytest

from seqlab.errors import ConfigError, DataError
from seqlab.parallel.cost import A100
from seqlab.parallel.groups import Costs, _buckets, costs, plan

SOFTMAX = Costs(token=1e-6, attend=1e-9, exchange=3e-7, far=5e-6, node=2, start=1e-4)
LINEAR = Costs(token=1e-6, hop=2e-5, start=1e-4)


def best_of_all(lengths, devices, capacity, costs) -> float:
    """The least time of any division into groups of powers of two and any assignment to them."""
    sizes = [2**i for i in range(devices.bit_length()) if 2**i <= devices]
    divisions = {
        groups
        for count in range(1, devices + 1)
        for groups in itertools.combinations_with_replacement(sizes, count)
        if sum(groups) <= devices
    }
    times = []
    for groups in divisions:
        for where in itertools.product(range(len(groups)), repeat=len(lengths)):
            held, time = np.zeros(len(groups)), np.zeros(len(groups))
            np.add.at(held, list(where), lengths)
            np.add.at(time, list(where), costs.seconds(lengths, np.array(groups)[list(where)]))
            if (held <= np.array(groups) * capacity).all():
                times.append((time + costs.start * (held > 0)).max())
    return min(times)


@pytest.mark.parametrize("costs", [SOFTMAX, LINEAR], ids=["softmax", "linear"])
@pytest.mark.parametrize("lengths", [[900, 40, 60, 300], [2900, 100, 110, 90], [700, 700, 700]])
def test_the_plan_is_the_best_of_all_assignments(lengths, costs):
    found = plan(lengths, 4, 1000, costs, gap=0)
    assert len(found.rounds) == 1
    assert found.seconds == pytest.approx(best_of_all(lengths, 4, 1000, costs), rel=1e-9)
    assert found.seconds <= found.static_seconds


def random_lengths(seed: int, count: int, longest: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(6, 1.3, count)), 8, longest).astype(int)


@pytest.mark.parametrize("count, devices, capacity", [(20, 8, 4000), (30, 8, 1500), (20, 6, 1500)])
def test_every_sequence_goes_to_one_group_and_no_device_holds_too_much(count, devices, capacity):
    lengths = random_lengths(count, count, 3 * capacity)
    found = plan(lengths, devices, capacity, SOFTMAX, buckets=4, gap=0.1)
    placed = [i for groups in found.rounds for group in groups for i in group.sequences]
    assert sorted(placed) == list(range(count))
    for groups in found.rounds:
        assert sum(group.devices for group in groups) <= devices
        for devices_, sequences, seconds in groups:
            taken = lengths[list(sequences)]
            assert taken.sum() <= devices_ * capacity
            assert seconds == pytest.approx(SOFTMAX.seconds(taken, devices_).sum() + SOFTMAX.start)
    slowest = [max(group.seconds for group in groups) for groups in found.rounds]
    assert found.seconds == pytest.approx(sum(slowest))
    assert len(found.rounds) >= lengths.sum() / (devices * capacity)


def test_one_long_among_many_short_sequences_has_devices_of_its_own():
    found = plan([3000, *[200] * 30], 8, 1600, SOFTMAX)
    assert sorted(group.devices for group in found.rounds[0]) == [1, 1, 1, 1, 4]
    assert found.speedup > 1.05
    assert f"{found.speedup:.2f} times as fast as groups of 4" in str(found)
    assert plan([500] * 8, 8, 1000, SOFTMAX).speedup == 1


def test_what_cannot_be_assigned_is_one_sentence():
    with pytest.raises(DataError, match="Sequence 1 has 9000 tokens but a group of 8 devices"):
        plan([10, 9000], 8, 1000, SOFTMAX)
    with pytest.raises(DataError, match="Sequence 0 has 0 tokens"):
        plan([0], 8, 1000, SOFTMAX)
    with pytest.raises(DataError, match="no sequence to assign"):
        plan([], 8, 1000, SOFTMAX)
    for devices, capacity in ((0, 1000), (8, 0)):
        with pytest.raises(ConfigError, match="give at least one of each"):
            plan([1], devices, capacity, SOFTMAX)


def test_buckets_add_as_few_tokens_as_possible():
    lengths = np.sort(random_lengths(0, 12, 5000))
    for most in (1, 2, 3, 20):
        ends = _buckets(lengths, most)
        assert ends[-1] == len(lengths) and (np.diff(ends, prepend=0) > 0).all()
        padded = lambda ends: sum(
            (lengths[end - 1] - lengths[start:end]).sum()
            for start, end in itertools.pairwise([0, *ends])
        )
        cuts = itertools.combinations(range(1, 12), min(most, 12) - 1)
        assert padded(ends) == min(padded([*cut, 12]) for cut in cuts)


def test_costs_of_a_model_follow_from_its_size():
    found = costs(A100, 1e9, 2048, softmax_layers=4, linear_layers=12, state_bytes=2**20)
    assert found.token == pytest.approx(6e9 / A100.flops)
    assert found.attend == pytest.approx(6 * 2048 * 4 / A100.flops)
    assert found.hop == pytest.approx(24 * A100.within(2**20))
    assert found.seconds(1000, 1) == pytest.approx(1000 * found.token + 1e6 * found.attend)
