"""The training step's program has one size and compiles in one time, however deep or long it is.

    python -m benchmarks.compile

Equations are those of the jaxpr, inner ones included. Expected on two CPU cores, in a few minutes:
both claims pass.
"""

import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

import benchmarks.record as record
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from seqlab.models.parameters import parameters
from seqlab.train import optimizer
from seqlab.train.step import Batch, make_step

DEPTHS, LENGTHS = (2, 8, 32), (256, 1024, 4096)


def main() -> int:
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [(repeats, LENGTHS[0]) for repeats in DEPTHS] + [(DEPTHS[0], T) for T in LENGTHS[1:]]
    rows = [measure(*case) for case in cases]
    sizes = sorted({row["equations"] for row in rows})
    times = [row["compile CPU seconds"] for row in rows]
    spread = max(times) / min(times)
    claims = [
        record.Claim("equations, whatever depth and length", f"{sizes}", len(sizes) == 1),
        record.Claim("longest compile time over shortest", f"{spread:.2f}", spread < 1.5),
    ]
    return record.record("compile", rows, claims)


def measure(repeats: int, length: int) -> dict:
    config = lm.Config(
        vocab=257,
        d_model=64,
        pattern=(mixer_config("gla"), mixer_config("mamba2")),
        repeats=repeats,
        remat="all",
    )
    model = jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    params = parameters(model)
    tx = optimizer.Config().build(100, dict.fromkeys(params, True))
    ids = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    step = make_step(model, tx)
    traced = step.trace(params, jax.eval_shape(tx.init, params), Batch(ids, ids))
    began = time.process_time()
    traced.lower().compile()
    return {
        "blocks": repeats * len(config.pattern),
        "length": length,
        "equations": sum(1 for _ in equations(traced.jaxpr.jaxpr)),
        "compile CPU seconds": time.process_time() - began,
    }


def equations(jaxpr: Jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda a: isinstance(a, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield from equations(getattr(inner, "jaxpr", inner))


if __name__ == "__main__":
    sys.exit(main())
