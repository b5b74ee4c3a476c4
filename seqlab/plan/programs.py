"""The programs of a run, compiled ahead of time for a topology from shapes alone.

They are those that `seqlab train` and generation run: train step, prefill, a step of decoding. No
weight is made anywhere.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqlab.infer import decode
from seqlab.infer.decode import Carry
from seqlab.infer.sample import row_keys
from seqlab.models.lm import LM
from seqlab.models.parameters import decays
from seqlab.parallel import compiler
from seqlab.parallel.mesh import DATA, Travel, use_mesh
from seqlab.plan.schedule import Schedule, read
from seqlab.train import state as states
from seqlab.train.config import Config
from seqlab.train.corpus import Batch
from seqlab.train.step import cross_entropy, make_step

BLOCK = 64  # tokens of a row that generation decodes in one call, as `infer.Session` does
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes on one device. What is given to a program and what it returns share where they can."""

    parameters: int
    optimizer: int
    inputs: int  # a batch, or a state and its tokens
    outputs: int  # that have no room in what was given
    temporaries: int  # gradients, activations, gathered weights
    code: int

    @property
    def total(self) -> int:
        return sum(self)


class Program(NamedTuple):
    """A compiled program and how many tokens it takes; `memory` is None where the compiler found
    no way to fit it, and `needed` is then what it needed. `fixed` are bytes that no batch changes:
    weights, moments and gradients."""

    name: str
    tokens: int
    fixed: int
    memory: Memory | None
    needed: float
    schedule: Schedule | None
    compile_seconds: float


def for_accelerators(config: Config) -> Config:
    """The same run with the compute dtype that it has on an accelerator."""
    if config.model.dtype != "auto":
        return config
    model = dataclasses.replace(config.model, dtype="bfloat16")
    return dataclasses.replace(config, model=model)


def compile_all(
    config: Config, mesh: Mesh, on_program: Callable[[str], object] = lambda name: None
) -> list[Program]:
    """Train step, prefill and a step of decoding, as this config runs them on this mesh."""
    programs = []
    for name, make in {"train step": train, "prefill": prefill, "decode": decoding}.items():
        on_program(name)
        programs.append(make(config, mesh))
    return programs


def train(config: Config, mesh: Mesh) -> Program:
    with _running_on(mesh, config):
        model = config.model.skeleton()
        optimizer = config.optimizer.build(config.steps, decays(model))
        state = states.abstract(model, optimizer, mesh)
        B, T = config.data.batch, config.data.length
        row = _array((B, T + 1), jnp.int32, mesh, DATA)
        step = make_step(model, optimizer, config.accumulate, cross_entropy, config.objective.ask)
        make = lambda: step.lower(*state, Batch(row, row))
        return _compile("train step", B * T, make, state.params, state.optimizer)


def prefill(config: Config, mesh: Mesh) -> Program:
    """Reads a whole row of the length trained on at once."""
    with _running_on(mesh, config):
        structure, params, carry = _generating(config, mesh)
        B, T = config.data.batch, config.data.length
        tokens, reset = (_array((B, T), dtype, mesh, DATA) for dtype in (jnp.int32, bool))
        make = lambda: decode.read_chunk.lower(structure, params, carry, tokens, reset)
        return _compile("prefill", B * T, make, params)


def decoding(config: Config, mesh: Mesh) -> Program:
    """A block of greedy tokens for every row of a batch."""
    with _running_on(mesh, config):
        structure, params, carry = _generating(config, mesh)
        B = config.data.batch
        row = _array((B,), jnp.int32, mesh)
        keys = _array((B,), jax.eval_shape(lambda: row_keys(0, B)).dtype, mesh)
        stop = _array((0,), jnp.int32, mesh)
        arguments = (structure, params, carry, row, row, row, keys, stop, {})
        make = lambda: decode.decode.lower(*arguments, top_k=None, block=BLOCK)
        return _compile("decode", B * BLOCK, make, params)


@contextlib.contextmanager
def _running_on(mesh: Mesh, config: Config) -> Iterator[None]:
    """As `use_mesh`, on devices that this machine does not have."""
    chosen = config.mesh
    travel = {f: getattr(chosen, f) for f in Travel._fields if hasattr(chosen, f)}
    with use_mesh(**travel), jax.set_mesh(mesh):
        yield


def _generating(config: Config, mesh: Mesh) -> tuple[Any, dict, Carry]:
    """What generation compiles for: the model's structure, its weights, an empty carry."""
    model: LM = config.model.skeleton()
    B = config.data.batch
    params = states.abstract(model, config.optimizer.build(1, decays(model)), mesh).params
    state = jax.tree.map(
        lambda a: _array(a.shape, a.dtype, mesh, None, DATA),
        jax.eval_shape(lambda model: model.init_state(B), model),
    )
    logits = _array((B, config.model.vocab), jnp.float32, mesh, DATA)
    return jax.tree.structure(model), params, Carry(state, logits)


def _array(shape, dtype, mesh: Mesh, *axes: str | None) -> Any:
    """A shape split over mesh axes, those that divide it."""
    fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=False)]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*fits)))


def _compile(name: str, tokens: int, lower: Callable, params: Any, optimizer: Any = ()) -> Program:
    weights, moments = shard_bytes(params), shard_bytes(optimizer)
    fixed = weights + moments + (weights if moments else 0)
    began = time.monotonic()
    try:
        compiled = lower().compile(compiler_options=compiler.TPU)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return Program(name, tokens, fixed, None, needed, None, time.monotonic() - began)
    took = time.monotonic() - began
    stats = compiled.memory_analysis()
    memory = Memory(
        parameters=weights,
        optimizer=moments,
        inputs=max(stats.argument_size_in_bytes - weights - moments, 0),
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Program(name, tokens, fixed, memory, memory.total, read(compiled.as_text()), took)


def _needed(message: str) -> float | None:
    """Bytes of HBM that the compiler says a program needs, if that is why it gave up."""
    found = re.search(r"Ran out of memory in memory space hbm\. Used ([\d.]+)([KMGT]?)", message)
    return float(found[1]) * _UNITS[found[2]] if found else None


def shard_bytes(tree: Any) -> int:
    """Of the shards of its leaves that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
