"""GPU kernels are tried before their first use; here on a GPU that is pretended, interpreted."""

import logging
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental import pallas as pl

from seqlab import doctor
from seqlab.kernels import families, platforms
from seqlab.kernels.on_gpu import trust
from seqlab.parallel.mesh import use_mesh


def doubled(by: float, slope: float, interpret=True):
    """2 x as a kernel, which may be wrong in itself or in its gradient."""

    def kernel(x, y):
        y[...] = by * x[...]

    @jax.custom_vjp
    def run(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, interpret=interpret)(x)

    run.defvjp(lambda x: (run(x), None), lambda _, dy: (slope * dy,))
    return run


@pytest.fixture
def tried(monkeypatch):
    """Trials of a session of their own on a pretended GPU, and which of them were made."""
    families.enter_all()
    monkeypatch.setattr(trust, "TRIALS", {})
    monkeypatch.setattr(trust, "DTYPES", {})
    monkeypatch.setattr(trust, "gpu_kind", lambda: "Pretended")
    trust.objection.cache_clear()
    made = []

    def enter(name, kernel):
        @trust.trial_of(name)
        def trial(dtype):
            made.append((name, dtype))
            return trust.Trial(kernel, lambda x: 2 * x, (np.linspace(-1, 1, 8, dtype=dtype),))

    yield enter, made
    trust.objection.cache_clear()


def test_a_kernel_that_agrees_is_used_and_was_tried_once_for_each_dtype(tried):
    enter, made = tried
    enter("right", doubled(2.0, 2.0))
    assert all(trust.trusted("right", dtype) for dtype in (jnp.float32, "float32", jnp.bfloat16))
    assert made == [("right", "float32"), ("right", "bfloat16")]


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (doubled(2.1, 2.0), r"its result .* is off by 5.0e-02, allowed 1e-05"),
        (doubled(2.0, 2.1), r"its gradient \[0\] is off by 5.0e-02, allowed 5e-05"),
        (doubled(float("nan"), 2.0), "its result .* is off by inf"),
        (doubled(2.0, 2.0, interpret=False), "it fails .Only interpret mode is supported on CPU"),
    ],
)
def test_one_that_does_not_is_left_alone_which_is_said_in_a_sentence(tried, caplog, kernel, reason):
    enter, _ = tried
    enter("wrong", kernel)
    with caplog.at_level(logging.WARNING, "seqlab"):
        assert not trust.trusted("wrong", jnp.float32) and not trust.trusted("wrong", jnp.float32)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("The GPU kernel of wrong is not used for float32 on Pretended, where ")
    assert said.endswith(": the form in XLA runs in its place.")
    assert re.search(reason, said)


def test_it_is_tried_while_a_program_on_a_mesh_is_being_traced(tried):
    enter, made = tried
    enter("right", doubled(2.0, 2.0))
    enter("wrong", doubled(3.0, 2.0))
    seen = {}

    def shard(x):
        seen.update({name: trust.trusted(name, x.dtype) for name in ("right", "wrong")})
        return x + 1

    with use_mesh(data=2):
        lifted = jax.shard_map(shard, in_specs=P("data"), out_specs=P("data"))
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(lifted(x))))(jnp.ones(4, jnp.float32))
    np.testing.assert_array_equal(gradient, np.ones(4))
    assert seen == {"right": True, "wrong": False} and len(made) == 2


def test_without_a_gpu_a_program_for_one_takes_the_kernel():
    assert trust.gpu_kind() is None
    assert trust.trusted("of no name: nothing is tried", jnp.float32)


class Times(NamedTuple):
    """A form that is seen in what is lowered."""

    factor: float

    def run(self, x):
        return self.factor * x


@pytest.mark.parametrize("platform, taken", [("cpu", 2), ("tpu", 3), ("cuda", 5), ("rocm", 2)])
def test_a_program_has_the_form_of_the_platform_that_it_is_lowered_for(platform, taken):
    forms: Any = platforms.Forms(Times(2), tpu=Times(3), gpu=Times(5))
    traced = jax.jit(lambda x: forms.call("run", x)).trace(np.float32(1))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [n for n in (2, 3, 5) if f"{n}.000000e+00" in text] == [taken]


def test_the_doctor_says_what_each_kernel_takes_here(tried):
    enter, _ = tried
    enter("right", doubled(2.0, 2.0))
    enter("wrong", doubled(3.0, 2.0))
    shown = [column._cells for column in doctor.gpu_kernels().columns]
    rows = list(zip(*shown, strict=True))
    assert rows[0] == ("right", "float32", "pallas_gpu", "agrees with XLA on Pretended")
    assert rows[2][:3] == ("wrong", "float32", "xla") and "is off by" in rows[2][3]


def test_without_a_gpu_the_doctor_says_so():
    rows = doctor.gpu_kernels()
    assert set(rows.columns[3]._cells) == {"no GPU here"} and rows.row_count >= len(trust.TRIALS)
