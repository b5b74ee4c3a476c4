"""The call of a TPU kernel, inside of a shard or outside, with its cost for `seqlab plan`."""

from collections.abc import Callable
from typing import Literal

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqlab.kernels.on_tpu.cost import estimate
from seqlab.kernels.varying import alike

#: Bytes of the vector memory a kernel may use: of 128 MiB on v5e, v5p and v6e, 64 MiB on tpu7x.
VMEM = 48 * 2**20


def call(
    kernel: Callable,
    grid: tuple[int, ...],
    inputs: list,
    outputs: list,
    scratch=(),
    scalars: tuple = (),
    *,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    cost: tuple[Callable, list, int],
    name: str,
    interpret=False,
):
    """The results of a kernel on a grid of steps.

    inputs     pairs of an array and its block
    outputs    pairs of a shape and its block
    scalars    arrays of one axis that are there before the first step: blocks may depend on them,
               and the kernel takes them first
    semantics  of each axis of the grid
    cost       f, shapes and dtypes of its arguments, and how often the kernel does its work; each
               array counts as read or written once
    """
    arrays, in_specs = zip(*inputs, strict=True)
    out_shape, out_specs = zip(*outputs, strict=True)
    arrays, out_shape = alike((*scalars, *arrays), out_shape)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM),
        cost_estimate=estimate(*cost, [*arrays, *out_shape]),
        interpret=interpret,
        name=name,
    )(*arrays)
