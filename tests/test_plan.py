"""Plans: what is read from compiled programs, and arithmetic where nothing can be compiled."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
import typer.testing

from seqlab import cli
from seqlab.errors import ConfigError
from seqlab.layers.mixers import lightning
from seqlab.models import lm
from seqlab.parallel import cost
from seqlab.plan import advice, analytic, flops, programs, schedule, topology
from seqlab.plan.command import plain
from seqlab.plan.estimate import estimate
from seqlab.train.config import Config, Mesh
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu"
)
MODEL = lm.Config(vocab=128, d_model=32, pattern=(lightning.Config(heads=2),), ffn=None)


def run(**fields) -> Config:
    """A tiny run; its data is never read."""
    data = Data(train=(Tokens(path="none"),), length=64, batch=2)
    return Config(**{"model": MODEL, "data": data, "steps": 2, "mesh": Mesh(seq=4), **fields})


@pytest.fixture(scope="module")
def tiny():
    """The plan of the tiny run on four chips: the only one that is compiled here."""
    return plain(programs.for_accelerators(run()), topology.parse("v5e:2x2"))


@libtpu
def test_a_plan_counts_what_a_device_holds(tiny):
    step = tiny["programs"][0]
    weights = 4 * tiny["parameters"]  # float32, whole on each device of a mesh without data, model
    assert step["memory"]["parameters"] == weights
    assert 2 * weights <= step["memory"]["optimizer"] < 2 * weights + 256
    assert step["needed"] == sum(step["memory"].values()) and step["fits"] and tiny["fits"]
    assert [p["program"] for p in tiny["programs"]] == ["train step", "prefill", "decode"]


@libtpu
def test_a_plan_counts_what_crosses_devices(tiny):
    prefill = {c["kind"]: c for c in tiny["programs"][1]["collectives"]}
    state = 2 * 2 * 16 * 16 * 4  # B, H, K, V of float32
    whole_tiles = state + 8 * 128 * 4  # the decays beside it are a few bytes
    assert prefill["all-gather"]["sent"] == 3 * whole_tiles  # from three others
    assert prefill["all-gather"]["count"] == 1
    assert tiny["programs"][2]["collectives"] == []  # a single token stays where it is


@libtpu
def test_a_plan_says_how_long_it_takes(tiny):
    step, prefill, decode = tiny["programs"]
    for p in (step, prefill, decode):
        parts = max(p["work"], p["products_at_peak"] or 0) + p["exposed"]
        assert p["seconds"] == pytest.approx(parts) and p["seconds"] > 0
        assert p["tokens_per_second"] == pytest.approx(p["tokens"] / p["seconds"])
    assert 0 < prefill["mfu"] < 1 and 0 < step["mfu"] < 1
    assert step["products_at_peak"] == 3 * prefill["products_at_peak"]
    json.dumps(tiny)


@libtpu
def test_devices_lie_one_link_apart():
    devices = topology.parse("v5p:4x4x4").mesh(1, 64, 1).devices.ravel()
    steps = zip(devices, devices[1:], strict=False)
    hops = [sum(abs(a - b) for a, b in zip(x.coords, y.coords, strict=True)) for x, y in steps]
    assert len(set(devices)) == 64 and set(hops) == {1}


PROGRAM = """
HloModule jit_step, is_scheduled=true

%condition (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%carry_on (p: f32[8]) -> f32[8] {
  %all-gather.2 = f32[64,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8]
}

%body (p: (s32[])) -> (s32[]) {
  %start = f32[64,8]{1,0} fusion(%p), calls=%carry_on
  %beside = f32[64,8]{1,0} fusion(%p), calls=%carry_on, x={"estimated_cycles":"500"}
  %done = f32[64,8]{1,0} fusion(%p), calls=%carry_on, x={"estimated_cycles":"30"}
  %ours = f32[8]{0} custom-call(%p), x={"cost_estimate":{"flops":"90","bytes_accessed":"40"}}
  %sum = bf16[100]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1},{2,3}}
}

%seldom (p: f32[8]) -> f32[8] {
  %small = f32[8]{0} fusion(%p), x={"estimated_cycles":"1"}
}

%often (p: f32[8]) -> f32[8] {
  %large = f32[8]{0} fusion(%p), x={"estimated_cycles":"1000"}
}

%fast (p: (s32[])) -> (s32[]) {
  %quick = f32[8]{0} fusion(%p), x={"estimated_cycles":"6"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[]) while(%p), condition=%condition, body=%body
  %send = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%p), channel_id=9
  %work = f32[8]{0} fusion(%p), x={"estimated_cycles":"20"}
  %sent = f32[8]{0} collective-permute-done(%send)
  %again = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%p), channel_id=9
  %hiding = (s32[]) while(%p), condition=%condition, body=%fast
  %gone = f32[8]{0} collective-permute-done(%again)
  %or = f32[8]{0} conditional(%p), branch_computations={%seldom, %often}
}
"""


def test_a_schedule_counts_loops_branches_and_what_hides():
    read = schedule.read(PROGRAM)
    assert read.cycles == 7 * (500 + 30) + 20 + 7 * 6 + 1000
    gather, total, send, again = sorted(read.collectives, key=lambda c: c.kind)
    assert gather[:6] == ("all-gather", 7, 64 * 8 * 4 * 3 / 4, 64 * 8 * 4, 4, 500)
    assert total[:6] == ("all-reduce", 7, 200.0, 200, 2, 0) and not total.overlapped
    assert send[:6] == ("collective-permute", 1, 32, 32, 2, 20) and send.overlapped
    assert again[:6] == ("collective-permute", 1, 32, 32, 2, 7 * 6)  # behind a whole loop
    assert read.kernels == (("ours", 7, 90, 40),)
    assert read.totals()[0] == {"kind": "all-gather", "count": 7, "sent": 7 * 1536, "overlapped": 7}


def test_what_no_work_hides_is_exposed():
    program = programs.Program("train step", 10, 0, programs.Memory(*[1] * 6), 6, None, 0.0)
    there = topology.Topology("v5p:2x2x1", "v5p", 4, ())
    sent = schedule.Collective("all-gather", 3, 1e6, 1, 4, 0, "")
    slow = 3 * (3 * there.link.gather.latency + 1e6 / there.link.gather.bandwidth)
    e = estimate(program._replace(schedule=schedule.Schedule((sent,), 1750)), there, 0)
    assert e.exposed == pytest.approx(slow) and e.seconds == pytest.approx(1e-6 + slow)
    hidden = schedule.Schedule((sent._replace(hidden=10**9),), 1750)
    assert estimate(program._replace(schedule=hidden), there, 0).exposed == 0


def test_a_kernel_takes_the_longer_of_its_products_and_its_traffic():
    program = programs.Program("train step", 10, 0, programs.Memory(*[1] * 6), 6, None, 0.0)
    there = topology.Topology("v5e:2x2", "v5e", 4, ())
    kernels = (
        schedule.Kernel("products", 3, int(197e9), 1),
        schedule.Kernel("traffic", 1, 1, 819 * 10**6),
    )
    e = estimate(program._replace(schedule=schedule.Schedule((), 1500, kernels)), there, 0)
    assert e.seconds == pytest.approx(3e-3 + 1e-3 + 1e-6)


def test_products_are_counted_as_often_as_they_run():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 4))
    loop = lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=5)[0]
    assert flops.products(loop, a, b) == 5 * 2 * 3 * 4 * 4
    either = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b)
    assert flops.products(jax.checkpoint(either), a, b) == 2 * 2 * 3 * 4 * 4


def test_a_plan_for_gpus_is_arithmetic_and_says_so():
    found = plain(run(mesh=Mesh(seq=4, model=2)), topology.parse("h100:8"))
    assert found["fits"] and "not compiled" in found["note"]
    assert found["memory"]["optimizer state"] >= 2 * found["memory"]["gradients"]
    whole = analytic.kept(run())
    assert whole > 128 * 32 * 4  # at least what enters the block, for every token
    assert analytic.kept(run(data=Data(train=(Tokens(path="none"),), length=128, batch=2))) == (
        pytest.approx(2 * whole, rel=0.02)
    )
    hop = cost.seconds("all_gather", 2 * 2 * 16 * 16 * 4 / 2, 0.0, 4, cost.LINKS["h100"])
    assert found["times"]["states"] == pytest.approx(2 * hop)


def test_a_run_that_does_not_fit_is_told_what_to_change():
    message = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    assert programs._needed(message) == 20.5 * 2**30
    assert programs._needed("something else") is None
    GiB = topology.GiB
    say = lambda weights, **fields: advice.advice(run(**fields), 20 * GiB, 16 * GiB, weights * GiB)
    assert "needs 20.0 GiB and has 16.0" in say(2) and "model.remat=all" in say(2)
    assert "accumulate=2" in say(2)
    assert "try mesh.seq=2 mesh.model=2" in say(15)
    assert "more devices" in say(15, mesh=Mesh(model=4))


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5q:4x4", "There is no topology 'v5q:4x4': did you mean 'v5p'"),
        ("cray:1", "known names are a100, b200"),
        ("v5p", "does not say how many devices: write it like v5e:4x4"),
        ("v5p:4x0", "does not say how many devices"),
        pytest.param("v5e:3x5", "There is no topology 'v5e:3x5'", marks=libtpu),
    ],
)
def test_a_topology_that_is_not_known_is_one_sentence(name, message):
    with pytest.raises(ConfigError) as error:
        topology.parse(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mesh_that_does_not_match_is_one_sentence():
    with pytest.raises(ConfigError, match="has 4 devices but h100:16 has 16: .*mesh.seq=16"):
        plain(run(), topology.parse("h100:16"))
    with pytest.raises(ConfigError, match="has 64 devices but h100:8 has 8: .*mesh.data=8"):
        topology.parse("h100:8").require(data=64, seq=1, model=1)


def test_without_libtpu_a_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'seqlab\[plan\]'"):
        topology.parse("v5e:2x2")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`seqlab plan` of the tiny run with a feed-forward layer and these arguments."""
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    (tmp_path / "tiny.py").write_text(
        "from seqlab.models import lm\n"
        "from seqlab.layers.mixers import lightning\n"
        "from seqlab.train.config import Config, Mesh\n"
        "from seqlab.train.data import Data\n"
        "from seqlab.train.sources import Tokens\n"
        "config = Config(model=lm.Config(vocab=128, d_model=32, pattern=(lightning.Config(),)),\n"
        "    data=Data(train=(Tokens(path='none'),), length=64, batch=2), steps=2)\n"
    )
    runner = typer.testing.CliRunner()
    return lambda *arguments: runner.invoke(
        cli.app, ["plan", str(tmp_path / "tiny.py"), *arguments]
    )


def test_the_command_prints_a_plan_and_its_status_says_whether_it_fits(command):
    shown = command("--topology", "h100:4", "mesh.seq=4", "--strategy", "ring")
    assert shown.exit_code == 0 and "The run fits." in shown.stdout and "ring" in shown.stdout
    stored = command("--topology", "h100:4", "mesh.seq=4", "--json")
    assert math.isclose(json.loads(stored.stdout)["devices"], 4)
    large = command("--topology", "a100:1", "data.length=67108864")
    assert large.exit_code == 1 and "The run does not fit." in large.stdout
    assert isinstance(
        command("--topology", "h100:4", "mesh.seq=4", "--strategy", "rnig").exception, ConfigError
    )
