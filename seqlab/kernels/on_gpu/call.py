"""The call of a GPU kernel, inside of a shard or outside.

It goes through Pallas' Triton backend, not through Mosaic GPU, whose asynchronous copies and
products of warp groups are for large tiles on Hopper and later, while most of these kernels walk in
time with small ones; Triton serves older GPUs too. Neither was timed here. A block beyond the end
of an array is not cut: kernels mask what they read and write.
"""

from collections.abc import Callable

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from seqlab.kernels.on_gpu.blocks import Blocks
from seqlab.kernels.varying import alike


def call(
    kernel: Callable,
    grid: tuple[int, ...],
    inputs: list,
    outputs: list,
    blocks: Blocks,
    *,
    name: str,
    interpret=False,
):
    """The results of a kernel on a grid of programs, whose order is not known.

    inputs   pairs of an array and its block
    outputs  pairs of a shape and its block
    """
    arrays, in_specs = zip(*inputs, strict=True)
    out_shape, out_specs = zip(*outputs, strict=True)
    arrays, out_shape = alike(arrays, out_shape)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_shape=out_shape,
        out_specs=out_specs,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=name,
    )(*arrays)
