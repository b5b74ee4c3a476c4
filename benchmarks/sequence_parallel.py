"""How states travel across devices: each strategy's time here, and the cost model's curves.

    python -m benchmarks.sequence_parallel

First one gated linear-attention layer's recurrence on eight virtual CPU devices, each with as many
tokens as one device has alone, strategies in turns; documents begin on the device before at most,
so that `window` is exact too. These devices share the cores, so the times show what a strategy adds
on a machine where sending costs nothing and every program step something, not what it would on a
network. With other work on the machine, read the CPU seconds: the results here were taken on two
cores with a load of 12, where times of the wall say nothing.

Then the cost model for 64 to 1024 devices and 1M to 8M tokens, its claims those of the papers, and
results/sequence_parallel.png.
"""

import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import benchmarks.record as record
from seqlab.bench import timing
from seqlab.conformance import tolerance
from seqlab.kernels.decayed_outer_product import decayed_outer_product
from seqlab.parallel.cost import A100, EXACT, H100, V5P, Link, seconds
from seqlab.parallel.iteration import LASP2, ZECO, compute, iteration, lasp1, ring_attention
from seqlab.parallel.mesh import STRATEGIES, use_mesh

DEVICES, TOKENS, HEADS, WIDTH, ROUNDS = 8, 256, 4, 64, 8
MEASURED = (*EXACT, "window")
MODELLED = (64, 128, 256, 512, 1024)
PICTURE = record.RESULTS / "sequence_parallel.png"

#: Ink, and a colour and line for each strategy, told apart without colour too.
INK, GRID = "#1f2328", "#d8dee4"
LOOKS = {
    "ring": ("#8c959f", ":", "v"),
    "all_gather": ("#cf222e", "--", "s"),
    "doubling": ("#bf8700", "-.", "D"),
    "all_scan": ("#0969da", "-", "o"),
    "two_level": ("#1a7f37", "-", "^"),
}


def main() -> int:
    rows, apart = measure()
    curves = [
        modelled(link, devices, name)
        for link in (H100, V5P)
        for devices in MODELLED
        for name in EXACT
    ]
    draw(PICTURE)
    record.record("sequence_parallel_model", curves, [])
    return record.record("sequence_parallel", rows, [agreement(apart), *directions()])


def measure() -> tuple[list[dict], float]:
    """A row for each strategy, and how far the farthest result is from one device's."""
    known = [name for name in MEASURED if name in STRATEGIES]
    for name in sorted(set(MEASURED) - set(known)):
        print(f"{name} is not there yet: skipped.", flush=True)
    tokens = inputs(DEVICES * TOKENS)
    expected = [np.asarray(a) for a in run("one device", tokens)()]
    works = {name: run(name, tokens) for name in known}
    apart = max(
        tolerance.error(a, e) for w in works.values() for a, e in zip(w(), expected, strict=True)
    )
    works["one device, its share"] = run("one device", inputs(TOKENS))
    laps: dict[str, list] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            laps[name].append(timing.lap(lambda: jax.block_until_ready(work())))
    best = {name: np.min(times, axis=0) for name, times in laps.items()}
    return [
        {
            "strategy": name,
            "ms": 1e3 * wall,
            "CPU ms": 1e3 * cpu,
            "of all_gather": wall / best["all_gather"][0],
            "CPU, of all_gather": cpu / best["all_gather"][1],
        }
        for name, (wall, cpu) in best.items()
    ], apart


def inputs(length: int) -> tuple:
    """Queries, keys, values, log decays and resets: documents as long as a device's tokens, each
    lying on two devices."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=(1, length, HEADS, *shape)), jnp.float32)
    reset = (np.arange(length) % TOKENS == TOKENS // 2)[None]
    return draw(WIDTH), draw(WIDTH), draw(WIDTH), -jnp.exp(draw(WIDTH) - 4), jnp.asarray(reset)


def run(name: str, tokens: tuple) -> Any:
    """Gradients with respect to queries and values: forward and backward, as one compiled call."""
    state = jnp.zeros((1, HEADS, WIDTH, WIDTH))
    loss = lambda q, v, k, g, reset: jnp.sum(
        jnp.square(decayed_outer_product(q, k, v, g, reset, state)[0])
    )
    q, k, v, g, reset = tokens
    if name == "one device":
        program = jax.jit(jax.grad(loss, (0, 1))).lower(q, v, k, g, reset).compile()
        return lambda: program(q, v, k, g, reset)
    hops = {"hops": 1} if name == "window" else {}
    with use_mesh(seq=DEVICES, strategy=name, **hops) as mesh:
        along = jax.NamedSharding(mesh, jax.P(None, "seq"))
        split = [jax.device_put(a, along) for a in (q, v, k, g, reset)]
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*split).compile()
    return lambda: program(*split)


def modelled(link: Link, devices: int, name: str) -> dict:
    """A layer's wait in one direction, and iterations against their computation alone."""
    return {
        "link": link.name,
        "devices": devices,
        "strategy": name,
        "ms": 1e3 * wait(name, link, devices),
        **{f"{m}M tokens": slower(name, link, devices, m) for m in (1, 2, 4, 8)},
    }


def wait(name: str, link: Link, devices: int) -> float:
    return seconds(name, ZECO.state_bytes, ZECO.transition_bytes, devices, link)


def slower(name: str, link: Link, devices: int, millions: int) -> float:
    """How many times as long an iteration takes as its computation alone."""
    tokens = millions * 2**20 // devices
    return iteration(name, ZECO, tokens, devices, link) / compute(ZECO, tokens, link)


def agreement(apart: float) -> record.Claim:
    says = "gradients of every strategy, against one device with all the tokens"
    return record.Claim(says, f"{apart:.1e} relative", bool(apart < 5e-5))


def directions() -> list[record.Claim]:
    """What the papers report, from the model."""
    tokens = 2 * 2**20 // 64
    lasp2 = iteration("all_gather", LASP2, tokens, 64, A100, overlap=False)
    over_lasp1 = lasp1(LASP2, tokens, 64, A100) / lasp2 - 1
    over_ring = ring_attention(LASP2, tokens, 64, A100) / lasp2 - 1
    tokens = 8 * 2**20 // 256
    gathered = iteration("all_gather", ZECO, tokens, 256, H100, overlap=False)
    over_gather = gathered / iteration("all_scan", ZECO, tokens, 256, H100) - 1
    beyond = wait("all_scan", H100, 256) / wait("two_level", H100, 256)
    alone = compute(ZECO, 2**14, H100)
    slower = iteration("all_scan", ZECO, 2**14, 64, H100) / alone - 1
    claim = lambda says, number, holds: record.Claim(says, f"{number:+.1%}", bool(holds))
    return [
        claim(
            "2M tokens on 64: all_gather over LASP-1 (paper: 15.2%)", over_lasp1, over_lasp1 > 0.1
        ),
        claim("the same over Ring Attention (paper: 36.6%)", over_ring, over_ring > 0.3),
        claim("8M on 256: all_scan over all_gather (paper: 60%)", over_gather, over_gather > 0.3),
        record.Claim("the same: two_level against all_scan", f"{beyond:.1f}x", bool(beyond > 2)),
        claim("1M on 64 devices against 16k on one, all_scan", slower, slower < 0.05),
    ]


def draw(path: pathlib.Path) -> None:
    """Above GPUs, below TPUs: the wait of a layer, and what it makes of an iteration."""
    figure = Figure(figsize=(11, 7.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3)
    for (left, middle, right), link in zip(grid, (H100, V5P), strict=True):
        for name, (color, line, marker) in LOOKS.items():
            look = {"color": color, "ls": line, "marker": marker, "ms": 4, "lw": 1.6, "label": name}
            left.plot(MODELLED, [1e3 * wait(name, link, p) for p in MODELLED], **look)
            for axes, millions in ((middle, 1), (right, 8)):
                axes.plot(MODELLED, [slower(name, link, p, millions) for p in MODELLED], **look)
        dress(left, f"{link.name}: a layer's state, one direction", "ms")
        for axes, millions in ((middle, 1), (right, 8)):
            dress(axes, f"{link.name}: {millions}M tokens", "iteration / its computation")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    title = "How long a state of 2 MiB travels, and what is left of it behind computation (model)"
    figure.suptitle(title, fontsize=12, color=INK)
    figure.savefig(path, dpi=130)


def dress(axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel=unit)
    axes.set_xticks(MODELLED, map(str, MODELLED))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.grid(color=GRID, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
