"""Kernels of torch packages beside those here, on one NVIDIA GPU: forward and backward, in turns.

    python -m benchmarks.gpu_peers [NAME ...]

B=8, T=4096, H=16, K=V=128 in bfloat16, the form that seqlab takes by itself. Packages that are not
installed are left out: flash-linear-attention (0.3 or later), mamba-ssm, mlstm_kernels, each with
torch for CUDA. A peer whose answer is not ours is not raced. It has never been run: no GPU was at
hand; the peers' signatures were read, not tried.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside JAX

import jax
import jax.numpy as jnp
import numpy as np
import torch

import benchmarks.record as record
from benchmarks import aims
from seqlab.bench import kernels, machine, timing
from seqlab.bench.families import CASES, Case, Draw, Shape
from seqlab.conformance import tolerance
from seqlab.errors import ConfigError
from seqlab.layers import exponential_memory as mlstm

SHAPE, ROUNDS, LEAST = Shape(8, 4096, 16, 128, 128), 9, 0.05
Tensors = Sequence[torch.Tensor]


class Peer(NamedTuple):
    """`prepare` makes the peer's arguments of ours, before any time is taken; `run` gives y, and
    `turned` says that it has heads before time."""

    name: str
    package: str
    case: Case
    prepare: Callable[[Tensors], Tensors]
    run: Callable[..., torch.Tensor]
    turned: bool = False


def peers() -> list[Peer]:
    found = []
    for make in (_gla, _mamba2, _mamba_ssm, _gated_delta_rule, _mlstm):
        try:
            found.append(make())
        except ImportError as missing:
            print(f"{make.__name__.strip('_')} has no peer here: {missing}", flush=True)
    return found


def _case(family: str, variant: str) -> Case:
    return next(case for case in CASES if (case.family, case.variant) == (family, variant))


def _gla() -> Peer:
    from fla.ops.gla import chunk_gla

    run = lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)[0]
    case = _case("decayed_outer_product", "one decay a channel")
    return Peer("GLA", "flash-linear-attention", case, lambda a: a[:4], run)


def _mamba2() -> Peer:
    from fla.ops.simple_gla import chunk_simple_gla

    run = lambda q, k, v, g: chunk_simple_gla(q, k, v, g, scale=1.0)[0]
    case = _case("decayed_outer_product", "one decay a head")
    return Peer("Mamba-2", "flash-linear-attention", case, _one_decay, run)


def _one_decay(a: Tensors) -> Tensors:
    return *a[:3], a[3][..., 0]


def _mamba_ssm() -> Peer:
    """Its step sizes weigh values and are decays at once: values come divided by them."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def prepare(a: Tensors) -> Tensors:
        dt = -a[3][..., 0]
        x = (a[2].float() / dt[..., None]).to(a[2].dtype)
        return x, dt, -torch.ones(dt.shape[-1], device=dt.device), a[1], a[0]

    run = lambda x, dt, A, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)
    case = _case("decayed_outer_product", "one decay a head")
    return Peer("Mamba-2", "mamba-ssm", case, prepare, run)


def _gated_delta_rule() -> Peer:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    prepare = lambda a: (*a[:3], a[4][..., 0], a[3])
    run = lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]
    case = _case("delta_rule", "one decay a head")
    return Peer("Gated DeltaNet", "flash-linear-attention", case, prepare, run)


def _mlstm() -> Peer:
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    def ours(q, k, v, i, f, implementation=None):
        s, forget = SHAPE, jax.nn.log_sigmoid(f)
        reset, state = jnp.zeros((s.B, s.T), bool), mlstm.empty(s.B, s.H, s.K, s.V)
        options: Any = {"eps": 1e-6, "implementation": implementation}
        return mlstm.exponential_memory(q, k, v, i, forget, reset, state, **options)[0]

    def arrays(draw: Draw, s: Shape) -> tuple:
        q, k, v = (draw.tokens(s.B, s.T, s.H, width) for width in (s.K, s.K, s.V))
        return q, k, v, draw.wide(s.B, s.T, s.H), draw.wide(s.B, s.T, s.H) + 3

    prepare = lambda a: [t.transpose(1, 2).contiguous() for t in a]
    run = lambda *a: mlstm_chunkwise__xl_chunk(*a, autocast_kernel_dtype=torch.bfloat16)
    case = Case("mlstm", "", ours, arrays, (0, 1, 2, 3, 4))
    return Peer("mLSTM", "mlstm_kernels", case, prepare, run, turned=True)


def theirs(peer: Peer, arrays: Sequence[jax.Array]) -> tuple[timing.Work, np.ndarray]:
    """Their forward and backward pass, and their y."""
    shared = [torch.from_dlpack(a).clone() for a in arrays if a.dtype != bool]
    given = [t.detach().requires_grad_() for t in peer.prepare(shared)]
    y = peer.run(*given)
    d_y = torch.ones_like(y)

    def work() -> None:
        torch.autograd.grad(peer.run(*given), given, d_y)
        torch.cuda.synchronize()

    y = y.transpose(1, 2) if peer.turned else y
    return work, y.detach().float().cpu().numpy()


def measure(peer: Peer) -> list[dict]:
    arrays = peer.case.arrays(Draw(jnp.bfloat16), SHAPE)
    ours = kernels.program(peer.case, arrays, None, kernels.BOTH)
    y = np.asarray(ours.work()[0], np.float32)
    other, their_y = theirs(peer, arrays)
    wrong = tolerance.error(their_y, y)
    if wrong > 3e-2:
        print(f"{peer.name} of {peer.package} is another function: {wrong:.0%} away", flush=True)
        return []
    laps = timing.race({"ours": ours.work, "theirs": other}, ROUNDS, LEAST)
    row = {
        "what": peer.name,
        "peer": peer.package,
        "pass": aims.BOTH,
        "tokens a row": SHAPE.T,
        "device": machine.name(),
        **timing.figure("our ms", timing.spread(1e3 * laps["ours"].seconds)),
        **timing.figure("their ms", timing.spread(1e3 * laps["theirs"].seconds)),
        **timing.figure("ratio", timing.ratio(laps["theirs"].seconds, laps["ours"].seconds)),
    }
    print(row, flush=True)
    return [row]


def main(names: list[str]) -> int:
    machine.take("gpu")
    rows = [row for p in peers() if p.name in (names or [p.name]) for row in measure(p)]
    if not rows:
        return 1
    return record.record("gpu_peers", rows, [record.claim(row) for row in rows])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:  # no GPU here
        sys.exit(str(error))
