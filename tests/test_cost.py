"""The cost model: its formulas, the strategy it chooses, the directions of published results."""

import dataclasses

import jax
import pytest

from seqlab.errors import ConfigError
from seqlab.parallel import cost
from seqlab.parallel.cost import A100, CPU, EXACT, H100, LINKS, V5P, choose, seconds
from seqlab.parallel.iteration import LASP2, ZECO, compute, iteration, lasp1, ring_attention

MIB = 2**20


def times(state: int, devices: int, link: cost.Link) -> dict[str, float]:
    return {name: seconds(name, state, 8192, devices, link) for name in EXACT}


def test_each_formula_by_hand():
    """No latency, gap or memory traffic: what remains is bytes over bandwidth."""
    wire = cost.Tier(0, 1.0)
    plain = cost.Link("wire", wire, wire, gap=0, hbm=float("inf"), flops=1)
    time = lambda name, devices=8, link=plain, **choices: seconds(
        name, 64, 16, devices, link, **choices
    )
    assert time("all_gather") == 7 * (64 + 16)
    assert time("ring") == 7 * 64
    assert time("all_scan", blocks=4) == (7 + 3) * 16
    assert time("doubling") == 3 * (64 + 16) + 64
    assert time("doubling", link=dataclasses.replace(plain, torus=True)) == (1 + 2 + 4) * 80 + 64
    # rows of 4: transitions along a row, three parts to others, a part across, three parts gathered
    assert time("two_level", row=4, blocks=1) == 3 * 80 + 3 * 20 + 16 + 3 * 16
    assert time("two_level", row=8, blocks=4) == time("all_scan", blocks=4)
    assert time("window", hops=2) == 2 * 64
    assert time("window", hops=99) == 7 * 64
    late = dataclasses.replace(plain, within=cost.Tier(3.0, 1.0), gap=40)
    assert time("ring", link=late) == 7 * 67
    assert time("all_scan", link=late, blocks=4) == 7 * 19 + 3 * 40
    nodes = dataclasses.replace(plain, between=cost.Tier(0, 0.5), node=4)
    assert time("ring", link=nodes) == 6 * 64 + 128
    assert time("ring", devices=4, link=nodes) == 3 * 64
    assert time("all_scan", link=nodes, blocks=4) == 6 * 16 + 32 + 3 * 32
    assert time("doubling", link=nodes) == 3 * 160 + 128


@pytest.mark.parametrize("name", EXACT)
def test_one_device_waits_for_nobody_and_more_devices_wait_longer(name):
    assert seconds(name, MIB, 0, 1, V5P) == 0
    for link in LINKS.values():
        waits = [seconds(name, MIB, 8192, devices, link) for devices in (4, 16, 64, 256)]
        assert waits == sorted(waits) and waits[0] > 0


def test_blocks_and_rows_are_the_best_of_all():
    for link in LINKS.values():
        scan = [seconds("all_scan", MIB, 0, 64, link, blocks=2**i) for i in range(8)]
        assert seconds("all_scan", MIB, 0, 64, link) == min(scan)
        rows = [seconds("two_level", MIB, 0, 64, link, row=row) for row in cost.rows(64)]
        assert seconds("two_level", MIB, 0, 64, link) == min(rows)
    assert cost.best_blocks(MIB, 64, V5P) == 16
    assert cost.best_row(MIB, 0, 64, V5P) == 8  # an 8 x 8 torus
    assert cost.best_row(MIB, 0, 64, H100) == 8  # a node


def test_the_choice_is_the_fastest_and_says_what_others_would_take():
    choice = choose(MIB, 8192, 64, V5P)
    waits = times(MIB, 64, V5P)
    assert choice.strategy == min(waits, key=lambda name: waits[name]) == "two_level"
    assert choice.seconds == waits["two_level"]
    assert choice.why == (
        "two_level: 96 us a layer on 64 v5p devices by the cost model; all_scan 0.21 ms, "
        "all_gather 0.54 ms, doubling 0.89 ms, ring 0.94 ms"
    )
    assert choose(MIB, 8192, 64, V5P, among=("all_gather", "ring")).strategy == "all_gather"
    assert "two_level" not in choose(MIB, 8192, 7, V5P).why  # no rows of a prime
    assert choose(MIB, 0, 1).why == "all_gather: on one device no state travels"
    assert choose(MIB, 0, 8) == choose(MIB, 0, 8, CPU)  # these tests run on a CPU


@pytest.mark.parametrize(
    "kind, platform, name",
    [
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5p", "tpu", "v5p"),
        ("TPU v6 lite", "tpu", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100"),
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("NVIDIA L4", "gpu", "a100"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_a_link_is_known_by_what_a_device_calls_itself(kind, platform, name, monkeypatch):
    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str

    monkeypatch.setattr(jax, "devices", lambda: [Device(kind, platform)])
    assert cost.this_link() is LINKS[name]


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="'all_scam': did you mean 'all_scan'"):
        seconds("all_scam", 1, 0, 8, V5P)
    with pytest.raises(ConfigError, match="A row of 3 does not divide 8"):
        seconds("two_level", 1, 0, 8, V5P, row=3)
    with pytest.raises(ConfigError, match="7 devices cannot be laid in rows"):
        seconds("two_level", 1, 0, 7, V5P)


def test_lasp2_is_ahead_of_lasp1_and_of_ring_attention_at_2m_tokens_on_64_gpus():
    """LASP-2's paper: 15.2% and 36.6%."""
    ours = iteration("all_gather", LASP2, 32768, 64, A100, overlap=False)
    assert 1.10 < lasp1(LASP2, 32768, 64, A100) / ours < 1.20
    assert 1.30 < ring_attention(LASP2, 32768, 64, A100) / ours < 1.45


def test_all_scan_is_ahead_of_all_gather_at_8m_tokens_on_256_gpus():
    """ZeCO's paper: 60% more tokens a second, its All-Scan 3.9 times as fast as the AllGather."""
    slow, fast = (
        iteration("all_gather", ZECO, 32768, 256, H100, overlap=False),
        iteration("all_scan", ZECO, 32768, 256, H100),
    )
    assert 1.3 < slow / fast < 1.7
    waits = times(ZECO.state_bytes, 256, H100)
    assert 3.5 < waits["all_gather"] / waits["all_scan"] < 4.5
    assert waits["two_level"] < waits["all_scan"] / 2


def test_a_million_tokens_on_64_devices_take_little_longer_than_16_thousand_on_one():
    alone = iteration("all_scan", ZECO, 16384, 1, H100)
    assert alone == compute(ZECO, 16384, H100)
    assert iteration("all_scan", ZECO, 16384, 64, H100) < 1.05 * alone
    assert iteration("all_gather", ZECO, 16384, 64, H100, overlap=False) > 1.2 * alone


def test_sends_started_by_a_kernel_save_latency_but_no_bandwidth():
    quick = V5P.remote_copies()
    assert seconds("all_scan", MIB, 0, 64, quick) < 0.5 * seconds("all_scan", MIB, 0, 64, V5P)
    assert seconds("ring", MIB, 0, 64, quick) > 0.9 * seconds("ring", MIB, 0, 64, V5P)
