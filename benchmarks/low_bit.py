"""Weights of few bits: how near they are, what they hold in memory, how fast they decode.

    python -m benchmarks.low_bit

A model is loaded by a process of its own, whose memory is measured before and after. Decoding is
of one sequence, where a step reads every weight, in CPU seconds of all threads. Expected on two CPU
cores, in about two minutes: all claims pass.
"""

import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import benchmarks.record as record
from seqlab.bench.timing import lap
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Session
from seqlab.kernels import quantize, trit_planes
from seqlab.layers import int8_linear, ptqtp_linear
from seqlab.layers.registry import mixer_config
from seqlab.models import lm, pack, store
from seqlab.models.parameters import bind, parameters

STEPS, ROUNDS = 64, 5
#: Relative errors |W - W'| / |W| of weights drawn from a normal distribution, and of such with 2 %
#: of them four times as large: ternary by the mean (BitNet b1.58), then PTQTP's planes.
REFERENCE = {
    "ternary": (0.513, 0.603),
    "1 plane": (0.434, 0.532),
    "2 planes": (0.167, 0.234),
    "3 planes": (0.077, 0.085),
}


def main() -> int:
    errors = [*quantizers(0), *quantizers(1), eight_bits()]
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(name, model, pathlib.Path(folder)) for name, model in models()]
    held = {row["weights"]: row["projections"] for row in rows}
    ratio = held["bfloat16"] / held["ternary"]
    claims = [
        *errors,
        record.Claim("ternary projections, against bfloat16", f"{ratio:.2f} x", ratio >= 7),
    ]
    return record.record("low_bit", rows, claims)


def quantizers(which: int) -> list[record.Claim]:
    """Claims of the errors of ternary weights, and of one to three planes."""
    r = np.random.default_rng(0)
    w = r.normal(0, 0.02, (1024, 512))
    if which:
        w = w * np.where(r.random(w.shape) < 0.02, 4, 1)
    codes, scale = quantize.ternary(w)
    near = {"ternary": codes * scale}
    with jax.enable_x64(True):
        for planes in (1, 2, 3):
            name = f"{planes} plane{'s' * (planes > 1)}"
            near[name] = trit_planes.restored(*trit_planes.fit(w, planes))
    about = "with outliers" if which else "normal weights"
    return [_near(f"{name}, {about}", away(near[name], w), REFERENCE[name][which]) for name in near]


def eight_bits() -> record.Claim:
    w = np.random.default_rng(0).normal(0, 0.02, (512, 512)).astype(np.float32)
    arrays = int8_linear.Config().quantized(jnp.asarray(w), "", np.zeros(512))
    return _near("int8, normal weights", away(arrays["codes"] * arrays["scale"], w), 0.007)


def away(near, w) -> float:
    return float(np.linalg.norm(np.asarray(near) - w) / np.linalg.norm(w))


def _near(says: str, error: float, reference: float) -> record.Claim:
    """At most 2 % above the reference, or what rounds to it."""
    holds = round(error, 3) <= 1.02 * reference
    return record.Claim(f"error of {says}, at most {reference}", f"{error:.3f}", holds)


def models():
    """One shape with every kind of weights, named."""
    built = lambda linear: lm.Config(
        vocab=257, d_model=512, pattern=(mixer_config("gla"),), repeats=2, linear=linear
    ).build(rngs=nnx.Rngs(0))
    dense = built("dense")
    narrow = {name: a.astype(jnp.bfloat16) for name, a in parameters(dense).items()}
    batches = [np.random.default_rng(0).integers(0, 257, (4, 128))]
    yield "float32", dense
    yield "bfloat16", bind(dense, narrow)
    yield "ternary", pack.ternary(built("bit"))
    yield "int8", pack.int8(dense, int8_linear.Config(), batches)
    yield "ptqtp, 3 planes", pack.ptqtp(dense, ptqtp_linear.Config())


def measured(name: str, model: lm.LM, folder: pathlib.Path) -> dict:
    path, squeezed = (store.save(model, folder / str(s), squeeze=s) for s in (False, True))
    session = Session(model)
    session.feed([256])
    decode = lambda: session.fork().complete(STEPS, Sampling())
    decode()  # compiles
    cpu = [lap(decode)[1] for _ in range(ROUNDS)]
    arrays = parameters(model).values()
    return {
        "weights": name,
        "projections": projections(model),
        "whole model": sum(a.nbytes for a in arrays),
        "process": loaded(path),
        "file": (path / store.WEIGHTS).stat().st_size,
        "squeezed file": (squeezed / store.WEIGHTS).stat().st_size,
        "CPU us per token": 1e6 * min(cpu) / STEPS,
    }


def projections(model: lm.LM) -> int:
    """Bytes of the weights that packing replaces."""
    params = parameters(model)
    if model.config.linear.trained_as is not None:
        return pack.projection_bytes(model)[0]
    config = dataclasses.replace(model.config, linear=ptqtp_linear.Config())
    packed = parameters(config.skeleton())
    return sum(params[name].nbytes for name in params.keys() - packed.keys())


def loaded(path: pathlib.Path) -> int:
    """Bytes that a process grows by when it loads the model once more."""
    script = (
        "import sys, jax, seqlab, seqlab.bench.machine as m\n"
        "held = [seqlab.load(sys.argv[1])]; jax.block_until_ready(held); a = m.memory('VmRSS')\n"
        "held += [seqlab.load(sys.argv[1]) for _ in range(8)]; jax.block_until_ready(held)\n"
        "print((m.memory('VmRSS') - a) // 8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
