"""`seqlab plan`: what a run needs and how fast it would be, on machines that one does not have."""

import dataclasses
import json
from typing import Any

from rich.console import Console

from seqlab.parallel import cost
from seqlab.plan import analytic, programs, report, topology
from seqlab.plan.advice import advice
from seqlab.plan.estimate import PASSES, Estimate, estimate
from seqlab.plan.flops import forward
from seqlab.plan.topology import Topology
from seqlab.train.config import Config


def plan(config: Config, name: str, strategy: str | None = None, as_json: bool = False) -> bool:
    """Print the plan of a run on a topology; returns whether the run fits it.

    Raises ConfigError for a topology or a strategy that is not known, for a mesh that does not
    match the topology, and for a TPU where libtpu is not installed.
    """
    config = programs.for_accelerators(config)
    if strategy is not None:
        mesh = dataclasses.replace(config.mesh, strategy=strategy)
        config = dataclasses.replace(config, mesh=mesh)
    found = plain(config, topology.parse(name))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        report.show(found, Console())
    return found["fits"]


def plain(config: Config, there: Topology) -> dict[str, Any]:
    """The plan as JSON-ready figures, in bytes and seconds."""
    m = config.mesh
    there.require(m.data, m.seq, m.model)
    config = _decided(config, there)
    head = report.head(config, there)
    return head | (_compiled(config, there) if there.is_tpu else analytic.plan(config, there))


def _decided(config: Config, there: Topology) -> Config:
    """With the strategy "auto", what the cost model chooses for the largest state of a layer on
    that machine's links, and not on this one's."""
    m = config.mesh
    if m.strategy != "auto":
        return config
    state = max(analytic.states_travelling(config), default=0.0)
    chosen = cost.choose(state, 0.0, m.seq, there.link).strategy
    return dataclasses.replace(config, mesh=dataclasses.replace(m, strategy=chosen))


def _compiled(config: Config, there: Topology) -> dict[str, Any]:
    m = config.mesh
    with Console(stderr=True).status("compiling") as status:
        say = lambda program: status.update(f"compiling the {program} for {there.name}")
        made = programs.compile_all(config, there.mesh(m.data, m.seq, m.model), say)
    flops = forward(config)
    counted = {"train step": PASSES * flops, "prefill": flops}
    estimates = [estimate(p, there, counted.get(p.name, 0)) for p in made]
    return {
        "fits": estimates[0].fits,
        "programs": [report.plain(e) for e in estimates],
        "advice": [_advice(config, e) for e in estimates if not e.fits],
    }


def _advice(config: Config, e: Estimate) -> str:
    if e.program.name == "train step":
        return advice(config, e.program.needed, e.capacity, e.program.fixed)
    return (
        f"The {e.program.name} of {e.program.tokens} tokens at once does not fit either; "
        "generation reads a prompt in pieces, which needs less."
    )
