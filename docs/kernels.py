"""The table of kernels.md: TPU kernels compiled ahead of time, and what they move.

python docs/kernels.py [TOPOLOGY ...]    (v5e:2x2 and others; libtpu compiles, nothing runs)
"""

import functools
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.parallel.mesh import make_mesh, use_mesh
from seqlab.plan import topology

PAGE = pathlib.Path(__file__).parent / "kernels.md"
MARK = "<!-- the rest is of python docs/kernels.py -->\n\n"
TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
B, T, H = 2, 2048, 4


class Case(NamedTuple):
    name: str
    f: Callable
    K: int = 128
    V: int = 128
    groups: int = H
    channels: int = 1
    chunk: int = 64
    normaliser: bool = False

    @property
    def family(self) -> str:
        return self.f.__name__

    @property
    def usual(self) -> bool:
        """Whether it is compiled for every target, not for the first alone."""
        return (self.K, self.V, self.groups, self.chunk) == (128, 128, H, 64)


CASES = [
    Case("one decay a head", decayed_outer_product),
    Case("one decay a head", decayed_outer_product, chunk=128),
    Case("one decay a head", decayed_outer_product, 64, 64),
    Case("one decay a head", decayed_outer_product, 64, 64, chunk=128),
    Case("one decay a head", decayed_outer_product, 256, 512),
    Case("one decay a head, shared keys", decayed_outer_product, 128, 64, groups=1),
    Case("one decay a head, normaliser", decayed_outer_product, 256, 512, normaliser=True),
    Case("one decay a head, normaliser", decayed_outer_product, normaliser=True),
    Case("one decay a channel", decayed_outer_product, channels=128),
    Case("one decay a channel", decayed_outer_product, channels=128, chunk=128),
    Case("one decay a channel", decayed_outer_product, 256, 512, channels=256),
    Case("one decay a head", delta_rule),
    Case("one decay a head", delta_rule, chunk=128),
    Case("one decay a head", delta_rule, 64, 64, chunk=128),
    Case("one decay a channel", delta_rule, channels=128),
    Case("one decay a channel", delta_rule, 64, 64, channels=64),
]


def main(targets) -> None:
    asked = [(case, targets[0]) for case in CASES]
    asked += [(case, target) for target in targets[1:] for case in CASES if case.usual]
    rows = [row for case, target in asked for row in measured(case, target)]
    text, mark, _ = PAGE.read_text("utf-8").partition(MARK)
    PAGE.write_text(text + mark + table(rows) + "\n", "utf-8")


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
    print(target, case.family, *case[2:], file=sys.stderr, flush=True)
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
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=here)
    wide = functools.partial(shape, dtype=jnp.float32)
    widths = [case.groups * case.K] * 2 + [H * case.V]
    gates = [wide(B, T, H)] * (case.f is delta_rule) + [wide(B, T, H * case.channels)]
    flat = [*(shape(B, T, width) for width in widths), *gates]
    state = wide(B, H, case.K, case.V + case.normaliser)

    def loss(flat, reset, state):
        heads = (case.groups, case.groups, *[H] * (len(flat) - 2))
        tokens = [a.reshape(B, T, h, -1) for a, h in zip(flat, heads, strict=True)]
        if case.f is delta_rule:
            tokens[3] = tokens[3][..., 0]
        options: Any = {"normaliser": True} if case.normaliser else {}
        y, state = case.f(*tokens, reset, state, chunk_size=case.chunk, **options)
        total = lambda a: jnp.sum(jnp.sin(a.reshape(B, T, -1).astype(jnp.float32)))
        return sum(map(total, jax.tree.leaves(y))) + jnp.sum(state)

    with use_mesh(), jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 2)))
        return str(program.lower(flat, shape(B, T, dtype=bool), state).compile().as_text())


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
    head = (
        "| kernel | decay | K, V | chunk | pass | MB | over the least | vector memory, KB | for |"
    )
    lines = [head, "|" + "---|" * 9]
    for case in CASES:
        for which in ("forward", "backward"):
            of = [row for row in rows if row.case == case and row.which == which]
            moved, ideal = max(row.moved for row in of), min(row.ideal for row in of)
            vmem = max(row.vmem for row in of)
            targets = ", ".join(row.target.partition(":")[0] for row in of)
            lines.append(
                f"| {case.family} | {case.name} | {case.K}, {case.V} | {case.chunk} | {which} | "
                f"{moved / 1e6:.1f} | {moved / ideal:.2f} | {vmem / 2**10:,.0f} | {targets} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
