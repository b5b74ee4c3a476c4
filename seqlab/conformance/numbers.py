"""Precision and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.conformance import tolerance
from seqlab.conformance.compiling import compiled
from seqlab.conformance.report import Finding, close, named, worst
from seqlab.conformance.trial import Results, Trial, gradients_of, step_by_step, whole


def bfloat16_keeps_a_float32_state(trial: Trial) -> Finding:
    """bf16 in, bf16 out, states as they were; near the float32 run on the same inputs."""
    rounded = trial.x.astype(jnp.bfloat16)
    actual = trial.run(rounded, trial.state, trial.reset)
    expected = trial.run(rounded.astype(np.float32), trial.state, trial.reset)
    wanted = named(Results(rounded, expected.state))
    for name, leaf in named(actual).items():
        if leaf.dtype != wanted[name].dtype:
            note = f"{name} is {leaf.dtype} instead of {wanted[name].dtype}"
            return Finding(float("inf"), 0.0, note)
    return worst([close(actual, expected, "in bfloat16", dtype=jnp.bfloat16)], "near float32")


def gradients_equal_the_step_form(trial: Trial) -> Finding:
    """y, the state, and gradients of x, every parameter and the state, in float64.

    A mixer with a backward pass by hand that also runs for T == 1 is compared with itself: let one
    token take the plain definition, as kernels do.
    """
    inputs = (trial.mixer, trial.x, trial.state, trial.stepped, trial.weights)
    single = trial.gradients(*inputs)
    with jax.enable_x64(True):
        inputs = jax.tree.map(_widest, inputs)
        expected = compiled(gradients_of(step_by_step))(*inputs)
        lowered = compiled(gradients_of(whole)).lower(*inputs)
        actual = lowered.compile()(*inputs)
        # a mixer that casts to float32 by name rounds there, whatever comes in
        rounds = "f32" in lowered.as_text()
    dtype = np.float32 if rounds else np.float64
    away = tolerance.worst(single[1], expected[1])[0]
    return worst(
        [
            close(actual[0], expected[0], "value", dtype=dtype),
            close(actual[1], expected[1], "gradient", tolerance.GRADIENT, dtype),
        ],
        f"{'the mixer casts to float32' if rounds else 'in float64'}; {away:.0e} away in float32",
    )


def extreme_inputs_stay_finite(trial: Trial) -> Finding:
    """y, the state and all gradients, for inputs far smaller and larger than usual."""
    findings = []
    for scale in (1e-6, 1, 50):
        x = np.float32(scale) * trial.x
        results = trial.gradients(trial.mixer, x, trial.state, trial.reset, trial.weights)
        leaves = named(dict(zip(("value", "gradient"), results, strict=True)))
        bad = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
        note = f"not finite for inputs of size {scale:g}: {', '.join(bad)}"
        findings.append(Finding(float(len(bad)), 0.0, note))
    return worst(findings, "inputs of size 1e-6, 1 and 50")


def every_parameter_learns(trial: Trial) -> Finding:
    """Each parameter has a finite gradient that is not zero everywhere."""
    inputs = (trial.mixer, trial.x, trial.state, trial.reset, trial.weights)
    _, gradients = trial.gradients(*inputs)
    gradients = {
        name.removeprefix("parameters."): np.asarray(gradient)
        for name, gradient in gradients.items()
        if name.startswith("parameters.")
    }
    dead = [name for name, g in gradients.items() if not g.any() or not np.isfinite(g).all()]
    note = f"without a gradient: {', '.join(dead)}" if dead else f"{len(gradients)} parameters"
    return Finding(float(len(dead)), 0.0, note)


def _widest(a):
    a = np.asarray(a)
    return a.astype(np.float64) if a.dtype == np.float32 else a
