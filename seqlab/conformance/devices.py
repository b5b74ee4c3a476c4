"""Compilation, and many devices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.conformance import tolerance
from seqlab.conformance.compiling import compiled
from seqlab.conformance.report import Finding, close, worst
from seqlab.conformance.trial import Trial, gradients_of, whole
from seqlab.parallel.mesh import DATA, MODEL, SEQ, Travel, use_mesh, weight_sharding

#: By the number of devices that they need: those of the largest number that is there are tried.
MESHES = {
    2: ({"seq": 2},),
    4: (
        {"seq": 4, "strategy": "two_level"},
        {"data": 2, "seq": 2, "strategy": "all_scan"},
        {"seq": 2, "model": 2},
    ),
    8: (
        {"seq": 4, "strategy": "two_level", "row": 2},
        {"data": 2, "seq": 2, "model": 2, "strategy": "all_scan"},
    ),
    16: ({"data": 2, "seq": 4, "model": 2, "strategy": "all_scan"},),
}


def compiles_once_per_shape(trial: Trial) -> Finding:
    """One trace for each shape of x, also when a mixer is fed the state it returned."""
    for x in (trial.x[:, :1], trial.x):
        state = trial.empty()
        for reset in (None, trial.reset[:, : x.shape[1]], None):
            _, state = trial.run(x, state, reset)
    shape, traces = max(trial.traces.items(), key=lambda item: item[1])
    note = f"traced {traces} times for x {list(shape[0])} {shape[1]}"
    return Finding(float(traces - 1), 0.0, note if traces > 1 else "fed with its own state")


def sharded_equals_one_device(trial: Trial) -> Finding:
    """y, the state and every gradient, with time, batch and heads split over devices."""
    count = jax.device_count()
    if count < 2:
        return Finding(None, None, "only one device here")
    meshes = MESHES[max(need for need in MESHES if need <= count)]
    inputs = (trial.mixer, trial.x, trial.state, trial.reset, trial.weights)
    expected = trial.gradients(*inputs)
    findings = [_on_mesh(mesh, inputs, expected) for mesh in meshes]
    return worst(findings, "; ".join(map(_called, meshes)))


def _on_mesh(axes: dict[str, Any], inputs, expected) -> Finding:
    mixer, x, state, reset, weights = inputs
    with use_mesh(**axes) as mesh:
        put = lambda tree, *spec: jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec))), tree
        )
        x, reset = put((x, reset), DATA, SEQ)
        mixer, state, weights = _placed(mixer, mesh), put(state, DATA), put(weights)
        # a new function, because a trace remembers the mesh it was made for
        results, gradients = compiled(gradients_of(whole))(mixer, x, state, reset, weights)
    where = _called(axes)
    return worst(
        [
            close(results, expected[0], f"{where}: value"),
            close(gradients, expected[1], f"{where}: gradient", tolerance.GRADIENT),
        ]
    )


def _placed(mixer, mesh):
    """The parameters where training would put them: by their logical axes, if they name any."""

    def put(variable):
        axes = variable.get_metadata().get("axes") if isinstance(variable, nnx.Variable) else None
        place = lambda a: weight_sharding(a.shape, axes or (None,) * jnp.ndim(a), mesh)
        return jax.tree.map(lambda a: jax.device_put(a, place(a)), variable)

    return jax.tree.map(put, mixer, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _called(mesh: dict[str, Any]) -> str:
    axes = (f"{name}={mesh[name]}" for name in (DATA, SEQ, MODEL) if name in mesh)
    return f"{' x '.join(axes)} by {mesh.get('strategy', Travel().strategy)}"
