"""The table of gpu_kernels.md: GPU kernels compiled ahead of time for Hopper, and what they need.

python docs/gpu_kernels.py    (the package triton compiles; no GPU is needed, and nothing runs)
"""

import functools
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jaxlib.triton import dialect
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver

from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.kernels.delta_rule import delta_rule
from seqlab.kernels.fused_rnn import cells, fused_rnn
from seqlab.kernels.selective_scan import selective_scan
from seqlab.kernels.ternary_matmul import ternary_matmul

PAGE = pathlib.Path(__file__).parent / "gpu_kernels.md"
MARK = "<!-- the rest is of python docs/gpu_kernels.py -->\n\n"
HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = pathlib.Path(driver.__file__).parent / "bin" / "cuobjdump"
B, T, H, K = 8, 4096, 16, 128
FEW, WIDE = jnp.bfloat16, jnp.float32


def shape(*sizes: int, dtype: Any = FEW):
    return jax.ShapeDtypeStruct(sizes, dtype)


class Case(NamedTuple):
    name: str
    about: str
    f: Callable
    args: tuple


def gradient(run: Callable, **options) -> Callable:
    """Of a loss of all that leaves, by all floating arguments."""

    def of_args(*args):
        def loss(floats):
            given = iter(floats)
            y, state = run(*(a if is_reset(a) else next(given) for a in args), **options)
            return sum(jnp.sum(a.astype(WIDE)) for a in jax.tree.leaves((y, state)))

        return jax.grad(loss)([a for a in args if not is_reset(a)])

    is_reset = lambda a: not isinstance(a, tuple) and a.dtype == bool
    return of_args


RESET, STATE = shape(B, T, dtype=bool), shape(B, H, K, K, dtype=WIDE)
QKV = (shape(B, T, H, K),) * 3
DECAYS = {"one decay a head": 1, "one decay a channel": K}
CASES = [
    *(
        Case(f.__name__, about, gradient(f), (*QKV, *beta, decay, RESET, STATE))
        for f, beta in ((decayed_outer_product, ()), (delta_rule, (shape(B, T, H, dtype=WIDE),)))
        for about, decay in ((a, shape(B, T, H, n, dtype=WIDE)) for a, n in DECAYS.items())
    ),
    *(
        Case(
            "selective_scan",
            f"{N} states",
            gradient(selective_scan),
            (shape(B, T, 4096), shape(B, T, 4096, dtype=WIDE), *[shape(B, T, 1, N)] * 2, RESET)
            + (shape(4096, N, dtype=WIDE), shape(B, 4096, N, dtype=WIDE)),
        )
        for N in (16, 64)
    ),
    *(
        Case(
            "fused_rnn",
            f"sLSTM, heads {d} wide",
            gradient(fused_rnn, cell=cells.slstm),
            (shape(B, T, H, 4, d), RESET, shape(H, d, 4, d), shape(H, 4, d, dtype=WIDE))
            + ((shape(B, H, d, dtype=WIDE),) * 4,),
        )
        for d in (64, 128)
    ),
    *(
        Case(
            "ternary_matmul",
            f"{M:,} x 3,200 x 8,640",
            ternary_matmul,
            (shape(M, 3200, dtype=jnp.int8), shape(800, 8640, dtype=jnp.uint8)),
        )
        for M in (1, 4096)
    ),
]


class Kernel(NamedTuple):
    """As it stands in a lowered program."""

    name: str
    code: str
    warps: int
    stages: int


def kernels(case: Case) -> list[Kernel]:
    lowered = jax.jit(case.f).trace(*case.args).lower(lowering_platforms=("cuda",))
    return list(map(_read, _calls(lowered.compiler_ir("stablehlo").operation)))


def _calls(operation) -> Iterator[Any]:
    """The configs of the calls of GPU kernels in it, deep down."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                if "triton" in str(inner.attributes.get("call_target_name", "")):
                    yield inner.attributes["mhlo.backend_config"]
                yield from _calls(inner.operation)


def _read(config) -> Kernel:
    with mlir.make_ir_context() as context:
        dialect.register_dialect(context)
        module = ir.Module.parse(config["ir"].value_bytes)
        code = module.operation.get_asm(enable_debug_info=False)
    numbers = (config[name].value for name in ("num_warps", "num_stages"))
    return Kernel(config["name"].value, code, *numbers)


def row(case: Case, kernel: Kernel, folder: pathlib.Path) -> str:
    """Of the table: what one kernel needs."""
    print(case.name, case.about, kernel.name, file=sys.stderr, flush=True)
    source, binary = folder / "kernel.ttir", folder / "kernel.cubin"
    source.write_text(kernel.code, "utf-8")
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(str(source), target=HOPPER, options=options)
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    )
    registers, spilled = (
        re.findall(rf"{what}:(\d+)", usage.stdout)[0] for what in ("REG", "STACK")
    )
    shared = f"{compiled.metadata.shared / 1024:.0f}"
    fields = (case.name, case.about, kernel.name, kernel.warps, registers, spilled, shared)
    return "| " + " | ".join(map(str, fields)) + " |"


def main() -> None:
    head = "| family | shapes | kernel | warps | registers | spilled, bytes | shared memory, KB |"
    with tempfile.TemporaryDirectory() as folder:
        each = functools.partial(row, folder=pathlib.Path(folder))
        rows = [each(case, kernel) for case in CASES for kernel in kernels(case)]
    text, mark, _ = PAGE.read_text("utf-8").partition(MARK)
    lines = [head, "|---" * 7 + "|", *dict.fromkeys(rows)]
    PAGE.write_text(text + mark + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
