"""The plan of a train step from arithmetic alone, for devices that nothing here compiles for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from seqlab.models.parameters import bind, decays, parameters
from seqlab.parallel import cost
from seqlab.parallel.mesh import DATA, MODEL, SEQ
from seqlab.plan.advice import advice
from seqlab.plan.estimate import PASSES
from seqlab.plan.flops import forward
from seqlab.plan.programs import shard_bytes
from seqlab.plan.topology import Topology
from seqlab.train import state as states
from seqlab.train.config import Config
from seqlab.train.corpus import Batch
from seqlab.train.step import loss

NOTE = (
    "Estimated, not compiled: libtpu compiles for TPUs alone. time = products / the rate that "
    "training reaches + gradients summed, weights gathered and states carried, nothing of it "
    "overlapped; activations are what the backward pass keeps, no further temporaries."
)


def plan(config: Config, there: Topology) -> dict[str, Any]:
    """Memory and times of a device, what to change, and how it was estimated."""
    memory = _memory(config)
    needed, capacity = sum(memory.values()), there.device.memory
    times = _times(config, there)
    total, tokens = sum(times.values()), config.data.batch * config.data.length
    useful = PASSES * forward(config) / (there.count * there.device.flops)
    fixed = needed - memory["activations"]
    fits = needed <= capacity
    return {
        "fits": fits,
        "memory": memory,
        "times": times | {"all": total},
        "tokens_per_second": tokens / total,
        "mfu": useful / total,
        "note": NOTE,
        "advice": [] if fits else [advice(config, needed, capacity, fixed)],
    }


def _memory(config: Config) -> dict[str, float]:
    m = config.mesh
    axes = (AxisType.Auto,) * 3
    mesh = AbstractMesh((m.data, m.seq, m.model), (DATA, SEQ, MODEL), axis_types=axes)
    model = config.model.skeleton()
    state = states.abstract(model, config.optimizer.build(config.steps, decays(model)), mesh)
    weights = shard_bytes(state.params)
    return {
        "parameters": weights,
        "optimizer state": shard_bytes(state.optimizer),
        "gradients": weights,
        "activations": kept(config) / (m.data * m.seq * config.accumulate),
    }


def kept(config: Config) -> float:
    """Bytes that the backward pass of a whole batch keeps of the forward pass: what of them grows
    with the length of the rows, that is, without weights."""
    length = config.data.length
    shorter = max(length // 2, 1)
    whole, half = (_residuals(config, n) for n in (length, shorter))
    return (whole - half) * length / (length - shorter) if length > shorter else whole


def _residuals(config: Config, length: int) -> int:
    model = config.model.skeleton()
    row: Any = jax.ShapeDtypeStruct((config.data.batch, length + 1), jnp.int32)
    pull_back = lambda params, batch: jax.vjp(lambda p: loss(bind(model, p), batch).nats, params)[1]
    residuals = jax.eval_shape(pull_back, parameters(model), Batch(row, row))
    c = config.model
    split = config.mesh.model if c.vocab % config.mesh.model == 0 else 1  # of logits
    return sum(
        leaf.size * leaf.dtype.itemsize // (split if c.vocab in leaf.shape else 1)
        for leaf in jax.tree.leaves(residuals)
    )


def _times(config: Config, there: Topology) -> dict[str, float]:
    m, link = config.mesh, there.link
    passes = PASSES + (config.model.remat == "all")
    model = config.model.skeleton()
    weights = 4 * sum(a.size for a in parameters(model).values()) / m.model
    many = m.data * m.seq
    # gradients go twice round in float32; a layer's weights, halved, before each of its passes
    sent = 2 * weights * (many - 1) / many + 2 * weights / 2 * (m.data - 1) / m.data
    hops = lambda size: cost.seconds(m.strategy, size, 0.0, m.seq, link)
    return {
        "products": passes * forward(config) / (there.count * link.flops),
        "gradients and weights": sent / link.gather.bandwidth,
        "states": 2 * config.accumulate * sum(map(hops, states_travelling(config))),
    }


def states_travelling(config: Config) -> list[float]:
    """Bytes of each layer's state on a device: of its rows and heads."""
    model, m = config.model.skeleton(), config.mesh
    rows = config.data.batch // config.accumulate / m.data
    sizes = []
    for block in jax.eval_shape(lambda model: model.init_state(1), model):
        leaves = jax.tree.leaves(block)  # [repeats, 1, ...]; none where nothing is remembered
        whole = sum(a.size * a.dtype.itemsize for a in leaves)
        repeats = leaves[0].shape[0] if leaves else 0
        sizes += [rows * whole / max(repeats, 1) / m.model] * repeats
    return sizes
