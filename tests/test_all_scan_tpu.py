"""All-Scan by remote copies: interpreted with a detector of races, and compiled for TPUs."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.experimental.pallas import tpu as pltpu

from seqlab.conformance import tolerance
from seqlab.parallel import all_scan_tpu, sequence
from seqlab.parallel.all_scan_tpu import all_scan
from seqlab.parallel.mesh import Travel, make_mesh
from seqlab.parallel.transitions import Diagonal
from seqlab.plan import schedule, topology


def fold(decay, update, state, reverse):
    """What enters each device of a row [devices, ...], in a loop."""
    entering, order = np.zeros_like(update), range(len(update))
    for device in reversed(order) if reverse else order:
        entering[device] = state
        state = decay[device] * state + update[device]
    return entering


def draws(data, devices, shape, wide=False):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    decay = rng.uniform(0, 1, (data, devices, *shape[:-1], shape[-1] if wide else 1))
    return decay.astype(np.float32), draw(data, devices, *shape), draw(data, *shape)


def on(mesh, **options):
    """all_scan on a mesh: decay and update [data, seq, ...], state [data, ...]."""
    checked = "interpret" not in options  # the interpreter does not speak of what varies

    def local(a, b, s):
        s = lax.pcast(s[0], "seq", to="varying") if checked else s[0]
        return all_scan(a[0, 0], b[0, 0], s, axis="seq", **options)[None, None]

    shards = P("data", "seq")
    specs = {"in_specs": (shards, shards, P("data")), "out_specs": shards}
    return jax.shard_map(local, mesh=mesh, check_vma=checked, **specs)


@pytest.fixture
def races(capfd):
    """Whether the interpreter's detector has reported any."""
    yield lambda: "RACE" in capfd.readouterr().out.upper()
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    "data, devices, shape, reverse, when",
    [
        (1, 8, (2, 16, 24), False, "on_wait"),
        (1, 4, (1, 16, 24), True, "eager"),
        (2, 4, (1, 16, 24), True, "on_wait"),
        (2, 2, (1, 16, 24), False, "eager"),
    ],
)
def test_remote_copies_carry_what_a_fold_does(races, data, devices, shape, reverse, when):
    decay, update, state = draws(data, devices, shape)
    interpret = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True)
    mesh = make_mesh(data=data, seq=devices)
    run = jax.jit(on(mesh, reverse=reverse, blocks=2, interpret=interpret))
    there = [fold(*row, reverse) for row in zip(decay, update, state, strict=True)]
    tolerance.assert_close(run(decay, update, state), np.stack(there))
    assert not races()


def test_a_race_would_be_seen(races, monkeypatch):
    """The same, where the device in the middle does not wait for what comes in."""
    copy = all_scan_tpu._copy

    def hasty(*arguments):
        made = copy(*arguments)
        return SimpleNamespace(start=made.start, wait_send=made.wait_send, wait_recv=lambda: None)

    monkeypatch.setattr(all_scan_tpu, "_copy", hasty)
    interpret = pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True)
    run = jax.jit(on(make_mesh(seq=3), blocks=1, interpret=interpret))
    jax.block_until_ready(run(*draws(1, 3, (1, 8, 8))))
    assert races()


def test_wide_states_and_decays_of_single_elements_go_too(monkeypatch):
    monkeypatch.setattr(all_scan_tpu, "VMEM", 40_000)
    assert all_scan_tpu.groups(48, 256 + 4 * 256, blocks=1) == (6, 8)
    decay, update, state = draws(1, 2, (2, 20, 130), wide=True)
    run = jax.jit(on(make_mesh(seq=2), blocks=1, interpret=pltpu.InterpretParams()))
    expected = fold(decay[0], update[0], state[0], False)
    tolerance.assert_close(run(decay, update, state), expected[None])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
@pytest.mark.parametrize("name, sizes", [("v5e:4x4", (2, 8, 1)), ("v5p:4x4x4", (1, 64, 1))])
def test_it_compiles_for_tpus(name, sizes):
    mesh = topology.parse(name).mesh(*sizes)
    data, seq, _ = sizes
    shape = lambda *shape, axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, P(*axes))
    )
    decay = shape(data, seq, 4, 128, 1, axes=("data", "seq"))
    update = shape(data, seq, 4, 128, 128, axes=("data", "seq"))
    state = shape(data, 4, 128, 128, axes=("data",))
    program = jax.jit(on(mesh, reverse=seq == 64)).lower(decay, update, state).compile()
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()
    assert schedule.read(program.as_text()).collectives == ()  # the kernel does it all


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles with libtpu")
def test_the_strategy_is_this_kernel_on_a_tpu_forward_and_backward():
    mesh = topology.parse("v5e:4x4").mesh(2, 8, 1)
    shards = P("data", "seq")

    def local(a, b, s):
        entering, _ = sequence.enter(Diagonal(a[0], b[0]), s[0], Travel("all_scan"))
        return entering[None]

    lifted = jax.shard_map(local, mesh=mesh, in_specs=(shards, shards, P("data")), out_specs=shards)
    loss = lambda a, b, s: jnp.sum(jnp.sin(lifted(a, b, s)))
    shape = lambda *shape, axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, axes)
    )
    numbers = (
        shape(2, 8 * 64, 1, axes=shards),
        shape(2, 8 * 64, 128, axes=shards),
        shape(2, 64, 128, axes=P("data")),
    )
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*numbers).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    assert "collective-permute" not in program
