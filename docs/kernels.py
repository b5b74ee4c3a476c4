"""The tables of kernels.md: programs compiled ahead of time for TPUs, and what is in them.

python docs/kernels.py [TOPOLOGY ...]    (v5e:2x2 and others; libtpu compiles, nothing runs)
"""

import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from seqlab.kernels.attention import attention_with_lse
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.kernels.linear_scan import linear_scan
from seqlab.kernels.selective_scan import selective_scan
from seqlab.layers.registry import mixer_config
from seqlab.models import lm
from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.plan import programs, topology
from seqlab.plan.estimate import PASSES, Estimate, estimate, in_kernel
from seqlab.plan.flops import forward
from seqlab.train.config import Config, Mesh
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

PAGE = pathlib.Path(__file__).parent / "kernels.md"
MARK = "<!-- the rest is of python docs/kernels.py -->\n\n"
TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
B, T, H = 2, 2048, 4
FEW, WIDE = jnp.bfloat16, jnp.float32


def main(targets) -> None:
    asked = [(case, targets[0]) for case in CASES]
    asked += [(case, target) for target in targets[1:] for case in CASES if case.usual]
    rows = [row for case, target in asked for row in measured(case, target)]
    of_steps = [stepped(step, targets[0]) for step in STEPS]
    text, mark, _ = PAGE.read_text("utf-8").partition(MARK)
    PAGE.write_text(text + mark + table(rows) + "\n\n" + steps_table(of_steps) + "\n", "utf-8")


# ---- kernels alone ----


class Case(NamedTuple):
    """A kernel of `family`, with a gradient; `usual` ones are compiled for every target.

    tokens   widths and dtype of each array of [B, T, ...]
    states   shapes of what a state of a row consists of, in float32
    run      tokens, weights, reset [B, T], states -> results
    weights  shapes, in bfloat16
    """

    family: str
    about: str
    widths: str
    chunk: str
    tokens: list[tuple[tuple[int, ...], Any]]
    states: list[tuple[int, ...]]
    run: Callable
    usual: bool = False
    weights: list[tuple[int, ...]] = []


def chunked(f: Any, about, K=128, V=128, chunk=64, *, groups=H, channels=1, normaliser=False):
    """A case of a scan over chunks."""
    tokens = [((groups, K), FEW), ((groups, K), FEW), ((H, V), FEW)]
    more = {delta_rule: [((H,), WIDE)], diagonal_plus_low_rank: [((H, K), FEW)] * 2}
    tokens += [*more.get(f, []), ((H, channels), WIDE)]
    options = {"chunk_size": chunk, **({"normaliser": True} if normaliser else {})}
    run = lambda tokens, weights, reset, states: f(*tokens, reset, *states, **options)
    usual = (K, V, groups, chunk) == (128, 128, H, 64)
    widths, states = f"{K}, {V}", [(H, K, V + normaliser)]
    return Case(f.__name__, about, widths, str(chunk), tokens, states, run, usual)


def elementwise(E=1024, N=16):
    """Scans of numbers: `linear_scan`, and `selective_scan` of N a channel."""

    def linear(tokens, weights, reset, states):
        a, b = tokens
        return linear_scan(jax.nn.sigmoid(a), b, reset, *states)

    def selective(tokens, weights, reset, states):
        u, dt, b, c = tokens
        A = -jnp.exp(weights[0].astype(WIDE))
        return selective_scan(u, jax.nn.softplus(dt), b, c, reset, A, *states)

    numbers, shared = [((E,), WIDE)] * 2, [((1, N), FEW)] * 2
    tokens = [((E,), FEW), ((E,), WIDE), *shared]
    return [
        Case("linear_scan", "", f"{E:,}", "", numbers, [(E,)], linear, True),
        Case("selective_scan", "", f"{E:,}, {N}", "", tokens, [(E, N)], selective, True, [(E, N)]),
    ]


def recurrent(cell, gates: int, leaves: int, d: int, usual=False):
    """A case of a non-linear cell, of so many gates and arrays in its state."""
    weights, states = [(H, d, gates, d), (H, gates, d)], [(H, d)] * leaves

    def run(tokens, weights, reset, states):
        return fused_rnn(*tokens, reset, *weights, tuple(states), cell=cell)

    tokens = [((H, gates, d), FEW)]
    return Case("fused_rnn", cell.__name__, str(d), "", tokens, states, run, usual, weights)


def softmax(about, K=128, V=128, *, groups=H, before=0, usual=False, **options):
    """A case of attention; of the keys, `before` come before the first query."""
    tokens = [((H, K), FEW), ((groups, K), FEW), ((groups, V), FEW)]

    def run(tokens, weights, reset, states):
        q, k, v = tokens
        position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        at = position, jnp.cumsum(reset, 1, dtype=jnp.int32)
        past = None
        if before:
            held = jnp.zeros((B, before), jnp.int32)
            past = *(jnp.zeros((B, before, *a.shape[2:]), FEW) for a in (k, v)), held, held - 1
        return attention_with_lse(q, k, v, *at, *at, past=past, **options)

    return Case("attention", about, f"{K}, {V}", "", tokens, [], run, usual)


CASES = [
    chunked(decayed_outer_product, "one decay a head"),
    chunked(decayed_outer_product, "one decay a head", chunk=128),
    chunked(decayed_outer_product, "one decay a head", 64, 64),
    chunked(decayed_outer_product, "one decay a head", 64, 64, 128),
    chunked(decayed_outer_product, "one decay a head", 256, 512),
    chunked(decayed_outer_product, "one decay a head, shared keys", 128, 64, groups=1),
    chunked(decayed_outer_product, "one decay a head, normaliser", 256, 512, normaliser=True),
    chunked(decayed_outer_product, "one decay a head, normaliser", normaliser=True),
    chunked(decayed_outer_product, "one decay a channel", channels=128),
    chunked(decayed_outer_product, "one decay a channel", chunk=128, channels=128),
    chunked(decayed_outer_product, "one decay a channel", 256, 512, channels=256),
    chunked(delta_rule, "one decay a head"),
    chunked(delta_rule, "one decay a head", chunk=128),
    chunked(delta_rule, "one decay a head", 64, 64),
    chunked(delta_rule, "one decay a channel", channels=128),
    chunked(delta_rule, "one decay a channel", 64, 64, channels=64),
    chunked(diagonal_plus_low_rank, "one decay a channel", channels=128),
    chunked(diagonal_plus_low_rank, "one decay a channel", 64, 64, channels=64),
    *elementwise(),
    recurrent(cells.slstm, 4, 4, 128, usual=True),
    recurrent(cells.slstm, 4, 4, 256),
    recurrent(cells.lstm, 4, 2, 64),
    recurrent(cells.gru, 3, 1, 128),
    softmax("causal", usual=True),
    softmax("causal, shared keys", 64, 64, groups=2),
    softmax("window of 512, 4 sinks", window=512, sinks=4),
    softmax("keys of 192 (MLA)", 192, 128),
]


class Row(NamedTuple):
    """Of one kernel of a compiled program: bytes of what it reads and writes as they lie in memory,
    padded to whole tiles; those of the same numbers without padding; and of the vector memory."""

    case: Case
    target: str
    which: str
    moved: int
    ideal: int
    vmem: int


def measured(case: Case, target: str) -> list[Row]:
    text = compiled(case, target)
    print(target, *case[:4], file=sys.stderr, flush=True)
    found = []
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            which = re.findall(rf"%{case.family}_(\w+)", line)[0]
            moved, ideal = traffic(line, text)
            [vmem] = re.findall(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
            found.append(Row(case, target, which, moved, ideal, int(vmem)))
    assert sorted(row.which for row in found) == ["backward", "forward"], found
    return found


def compiled(case: Case, target: str) -> str:
    """The gradient of a loss of what leaves, on one device of the target. Arrays come as a model's
    projections leave them: heads side by side."""
    mesh = make_mesh(devices=topology.parse(target).devices)
    here = jax.NamedSharding(mesh, P())
    shape = lambda *s, dtype: jax.ShapeDtypeStruct(s, dtype, sharding=here)
    flat = [shape(B, T, math.prod(widths), dtype=dtype) for widths, dtype in case.tokens]
    weights = [shape(*s, dtype=FEW) for s in case.weights]
    states = [shape(B, *s, dtype=WIDE) for s in case.states]

    def loss(flat, weights, states, reset):
        tokens = [a.reshape(B, T, *w) for a, (w, _) in zip(flat, case.tokens, strict=True)]
        total = lambda a: jnp.sum(jnp.sin(a.reshape(len(a), -1).astype(WIDE)))
        return sum(map(total, jax.tree.leaves(case.run(tokens, weights, reset, states))))

    with use_mesh(), jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        given = flat, weights, states, shape(B, T, dtype=jnp.bool_)
        return str(program.lower(*given).compile().as_text())


# ---- whole train steps ----


class Step(NamedTuple):
    """A mixer of a model, and the family of its kernels."""

    family: str
    mixer: str
    fields: dict[str, Any]


STEPS = [
    Step("decayed_outer_product", "gla", {"expand_k": 1.0}),
    Step("decayed_outer_product", "mamba2", {"head_dim": 64, "d_state": 128}),
    Step("decayed_outer_product", "mlstm", {"heads": 2}),
    Step("delta_rule", "gated_delta_net", {"key_heads": 4, "key_dim": 128, "value_dim": 128}),
    Step("delta_rule", "kda", {"key_dim": 128, "value_dim": 128}),
    Step("selective_scan", "mamba", {}),
    Step("linear_scan", "rg_lru", {}),
    Step("fused_rnn", "slstm", {}),
    Step("diagonal_plus_low_rank", "rwkv7", {"heads": 8}),
    Step("attention", "attention", {"max_length": 1024}),
]


class Stepped(NamedTuple):
    step: Step
    in_xla: Estimate
    chosen: Estimate
    kernels: list[str]
    in_kernels: float


def stepped(step: Step, target: str) -> Stepped:
    """A train step of two layers, with the form in XLA and with what is taken there."""
    there = topology.parse(target)
    in_xla, chosen = (_estimated(step, there, name) for name in ("xla", None))
    print(target, step.mixer, in_xla.seconds, chosen.seconds, file=sys.stderr, flush=True)
    kernels = chosen.program.schedule.kernels if chosen.program.schedule else ()
    seconds = sum(k.count * in_kernel(k, there.device) for k in kernels)
    return Stepped(step, in_xla, chosen, sorted({k.name for k in kernels}), seconds)


def _estimated(step: Step, there, implementation: str | None) -> Estimate:
    mixer = mixer_config(step.mixer, **step.fields, implementation=implementation)
    model = lm.Config(vocab=1024, d_model=512, pattern=(mixer,), repeats=2, ffn=None)
    data = Data(train=(Tokens(path="none"),), length=1024, batch=4)
    config = Config(model=model, data=data, steps=2, mesh=Mesh(data=2, model=2))
    config = programs.for_accelerators(config)
    program = programs.train(config, there.mesh(2, 1, 2))
    return estimate(program, there, PASSES * forward(config))


def steps_table(rows: list[Stepped]) -> str:
    head = "| kernels | mixer | in XLA, ms | with kernels, ms | XLA over kernels | in kernels, ms |"
    lines = [head, "|" + "---|" * 6]
    for step, in_xla, chosen, kernels, seconds in rows:
        before, after = in_xla.seconds or math.nan, chosen.seconds or math.nan
        of = step.family if kernels else f"{step.family} (none)"
        lines.append(
            f"| {of} | {step.mixer} | {1e3 * before:.2f} | {1e3 * after:.2f} | "
            f"{before / after:.2f} | {1e3 * seconds:.2f} |"
        )
    return "\n".join(lines)


# ---- reading the compiled text ----

ARRAY = re.compile(r"(bf16|f32|s32|pred)\[([\d,]*)\]\{([\d,]*)(?::([^}]*))?\}")
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}


def traffic(line: str, text: str) -> tuple[int, int]:
    """Bytes that a kernel moves and the least it could: what it reads, each array once, and what
    it writes."""
    result, call = line.split(" custom-call(", 1)
    names = re.findall(r"%([\w.\-]+)", call.split(")", 1)[0])
    where = dict(re.findall(r"%([\w.\-]+) = (\S+) ", text))
    arrays = ARRAY.findall(result) + [a for name in names for a in ARRAY.findall(where[name])]
    return sum(map(padded, arrays)), sum(map(plain, arrays))


def plain(array) -> int:
    dtype, sizes, _, _ = array
    return BYTES[dtype] * math.prod(map(int, filter(None, sizes.split(","))))


def padded(array) -> int:
    """With its last axes filled up to whole tiles."""
    dtype, sizes, order, tiling = array
    sizes = [int(n) for n in sizes.split(",")]
    axes = [int(n) for n in order.split(",")]
    first = re.search(r"T\(([\d,]+)\)", tiling)
    for axis, tile in zip(axes, reversed(first[1].split(",")) if first else (), strict=False):
        sizes[axis] = -(-sizes[axis] // int(tile)) * int(tile)
    return BYTES[dtype] * math.prod(sizes)


def table(rows: list[Row]) -> str:
    head = "| kernel | of | K, V | chunk | pass | MB | over the least | vector memory, KB | for |"
    lines = [head, "|" + "---|" * 9]
    for case in CASES:
        for which in ("forward", "backward"):
            of = [row for row in rows if row.case is case and row.which == which]
            moved, ideal = max(row.moved for row in of), min(row.ideal for row in of)
            vmem = max(row.vmem for row in of)
            targets = ", ".join(row.target.partition(":")[0] for row in of)
            lines.append(
                f"| {' | '.join(case[:4])} | {which} | {moved / 1e6:.1f} | {moved / ideal:.2f} | "
                f"{vmem / 2**10:,.0f} | {targets} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
