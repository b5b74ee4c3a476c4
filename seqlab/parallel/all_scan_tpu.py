"""All-Scan (ZeCO, Chou et al., 2025) as a TPU kernel: each device writes the blocks of its state
straight into the memory of the next.

The loop form starts one step of a program for each block; here a block leaves as soon as it is
there, and a link is never idle between two of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8  # the tile in which float32 lies in a TPU's memory
#: What a kernel's five buffers may take of the vector memory, of which it has 16 MiB by default.
VMEM = 12 * 2**20
#: Kernels that run at the same time need different numbers: one a direction.
COLLECTIVE_ID = {False: 20, True: 21}


def all_scan(
    decay: jax.Array,
    update: jax.Array,
    state: jax.Array,
    axis: str,
    reverse: bool = False,
    blocks: int = 8,
    interpret: Any = False,
) -> jax.Array:
    """The state that enters this device, when device r makes decay * state + update of what
    enters it. Inside a shard_map over all axes of its mesh, where all three vary alike.

    decay      [..., K, 1], or of the update's shape: this device's; float32
    update     [..., K, V] float32
    state      [..., K, V] float32: what enters the first device (the last one, if `reverse`);
               on others its values do not matter
    blocks     in how many the state is cut; fewer where a block would be less than a tile
    interpret  `pltpu.InterpretParams()` runs it on any machine, without `check_vma`

    A state too wide for a device's vector memory goes in several kernels, one after the other.
    """
    R, V = math.prod(update.shape[:-1]), update.shape[-1]
    rows = lambda x: jnp.broadcast_to(x, (*update.shape[:-1], x.shape[-1])).reshape(R, -1)
    shared = decay.shape[-1] == 1  # by the columns of a row
    a = jnp.broadcast_to(decay, (*decay.shape[:-1], LANES)) if shared else decay
    columns = [_up(x.shape[-1], LANES) for x in (a, update, state)]
    blocks = min(blocks, -(-R // SUBLANES))
    count, size = groups(R, columns[0] + 4 * columns[1], blocks)
    parts = [
        jnp.pad(rows(x), ((0, count * size - R), (0, wide - x.shape[-1]))).reshape(count, size, -1)
        for x, wide in zip((a, update, state), columns, strict=True)
    ]
    entering = [
        _kernel_call([x[group] for x in parts], axis, reverse, blocks, interpret)
        for group in range(count)
    ]
    return jnp.concatenate(entering)[:R, :V].reshape(update.shape)


def groups(rows: int, columns: int, blocks: int) -> tuple[int, int]:
    """How many groups rows of so many float32 columns make that fit the vector memory, and how
    many rows, a multiple of `blocks` tiles, each of them has."""
    tile = SUBLANES * blocks
    fitting = max(VMEM // (4 * columns) // tile, 1) * tile
    count = -(-rows // fitting)
    return count, _up(-(-rows // count), tile)


def _kernel_call(arrays, axis, reverse, blocks, interpret):
    update = arrays[1]
    varies = jax.typeof(update).manual_axis_type  # as the types of shard_map ask for
    vector = pl.BlockSpec(memory_space=pltpu.VMEM)
    semaphores = pltpu.SemaphoreType.DMA((blocks,))
    return pl.pallas_call(
        functools.partial(_kernel, axis=axis, reverse=reverse, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct(update.shape, update.dtype, manual_axis_type=varies),
        in_specs=[vector] * 3,
        out_specs=vector,
        scratch_shapes=[pltpu.VMEM(update.shape, update.dtype), semaphores, semaphores],
        compiler_params=pltpu.CompilerParams(
            collective_id=COLLECTIVE_ID[reverse], has_side_effects=True
        ),
        interpret=interpret,
        name="all_scan",
    )(*arrays)


def _kernel(decay, update, state, entering, leaving, sent, received, *, axis, reverse, blocks):
    """Blocks of `entering` are written by the device before, each once and with a semaphore of its
    own, so that no block waits for another to be read. What must not happen is that it writes
    before this kernel runs here: so it waits for a signal, one a call."""
    size, step = lax.axis_size(axis), -1 if reverse else 1
    first = lax.axis_index(axis) == (size - 1 if reverse else 0)
    last = lax.axis_index(axis) == (0 if reverse else size - 1)
    ready = pltpu.get_barrier_semaphore()

    @pl.when(~first)
    def _():
        before = _neighbour(axis, -step)
        pl.semaphore_signal(ready, 1, device_id=before, device_id_type=pl.DeviceIdType.MESH)

    @pl.when(first)
    def _():
        entering[...] = state[...]

    @pl.when(~last)
    def _():
        pl.semaphore_wait(ready, 1)

    n = update.shape[0] // blocks
    shared = decay.shape != update.shape  # in each lane the same
    copies = [_copy(leaving, entering, sent, received, j, n, axis, step) for j in range(blocks)]
    for j, copy in enumerate(copies):
        block = pl.ds(j * n, n)

        @pl.when(~first)
        def _(copy=copy):
            copy.wait_recv()  # of the block that comes in: it has as many bytes as the one sent

        @pl.when(~last)
        def _(copy=copy, block=block):
            factor = decay[block][:, :1] if shared else decay[block]
            leaving[block] = factor * entering[block] + update[block]
            copy.start()

    @pl.when(~last)
    def _():
        for copy in copies:
            copy.wait_send()


def _copy(leaving, entering, sent, received, j, n, axis, step):
    """Block j, from here into what enters the next device."""
    block = pl.ds(j * n, n)
    return pltpu.make_async_remote_copy(
        src_ref=leaving.at[block],
        dst_ref=entering.at[block],
        send_sem=sent.at[j],
        recv_sem=received.at[j],
        device_id=_neighbour(axis, step),
        device_id_type=pl.DeviceIdType.MESH,
    )


def _neighbour(axis: str, step: int) -> tuple:
    """The place in the mesh of the device so many steps along one axis."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(lax.axis_index(name) + (step if name == axis else 0) for name in names)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
