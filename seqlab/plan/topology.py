"""The machines a plan can be made for: what a device of each generation has, and TPU topologies."""

import importlib.util
import math
import os
from typing import NamedTuple

from jax.experimental import topologies
from jax.sharding import Mesh

from seqlab.errors import ConfigError, nearest
from seqlab.parallel.cost import LINKS, Link
from seqlab.parallel.mesh import make_mesh

GiB = 2**30


class Device(NamedTuple):
    """What one device has: a chip, or on tpu7x each half of one.

    memory     bytes of HBM
    flops      peak bfloat16 floating-point operations a second
    bandwidth  bytes a second to and from HBM
    link       its network, a name in `parallel.cost.LINKS`
    clock      cycles a second of a TPU's core, in which its compiler estimates; None for GPUs
    """

    memory: float
    flops: float
    bandwidth: float
    link: str
    clock: float | None = None


#: From the makers' data sheets: cloud.google.com/tpu/docs for TPUs, NVIDIA's for SXM GPUs. A TPU's
#: clock follows from its peak: v5e 197e12 = 4 matrix units x 128 x 128 x 2 x 1.5 GHz, v5p twice
#: as many at 1.75 GHz, v6e 4 of 256 x 256 at 1.75 GHz; that of tpu7x is not published.
DEVICES = {
    "v5e": Device(16 * GiB, 197e12, 819e9, "v5e", 1.5e9),
    "v5p": Device(95 * GiB, 459e12, 2765e9, "v5p", 1.75e9),
    "v6e": Device(32 * GiB, 918e12, 1640e9, "v6e", 1.75e9),
    "tpu7x": Device(96 * GiB, 1153e12, 3690e9, "v6e"),  # half a chip of 192 GiB and 2307e12
    "a100": Device(80e9, 312e12, 2039e9, "a100"),
    "h100": Device(80e9, 989e12, 3350e9, "h100"),
    "h200": Device(141e9, 989e12, 4800e9, "h100"),
    "b200": Device(180e9, 2250e12, 8000e9, "h100"),
}
#: Known ones, a shape each; a TPU of three dimensions is a torus of chips.
EXAMPLES = (
    "v5e:4x4",
    "v5p:4x4x4",
    "v6e:8x8",
    "tpu7x:4x4x4",
    "a100:8",
    "h100:64",
    "h200:8",
    "b200:8",
)


class Topology(NamedTuple):
    """`count` devices of a generation; `devices` are those of a TPU topology."""

    name: str
    generation: str
    count: int
    devices: tuple

    @property
    def device(self) -> Device:
        return DEVICES[self.generation]

    @property
    def link(self) -> Link:
        return LINKS[self.device.link]

    @property
    def is_tpu(self) -> bool:
        return self.device.clock is not None or self.generation == "tpu7x"

    def mesh(self, data: int, seq: int, model: int) -> Mesh:
        """The mesh of these sizes over all devices; ConfigError where they are more or fewer."""
        self.require(data, seq, model)
        return make_mesh(data, seq, model, self.devices)

    def require(self, data: int, seq: int, model: int) -> None:
        if data * seq * model != self.count:
            rest, over = divmod(self.count, data * model)
            remedy = f"mesh.seq={rest}" if not over and rest else f"mesh.data={self.count}"
            raise ConfigError(
                f"The mesh data={data} x seq={seq} x model={model} has {data * seq * model} "
                f"devices but {self.name} has {self.count}: give for example {remedy}, or another "
                "--topology."
            )


def parse(name: str) -> Topology:
    """`v5p:4x4x4`, or for GPUs `h100:64`. Raises ConfigError where there is no such topology, or
    libtpu is not installed, which knows the TPUs'."""
    generation, _, shape = name.lower().partition(":")
    if generation not in DEVICES:
        known = nearest(generation, DEVICES)
        raise ConfigError(f"There is no topology {name!r}: {known} (for example {_examples()})")
    sizes = shape.split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ConfigError(f"{name!r} does not say how many devices: write it like {_examples()}.")
    topology = Topology(name, generation, math.prod(map(int, sizes)), ())
    if not topology.is_tpu:
        return topology
    devices = tuple(_tpu_devices(name.lower()))
    return topology._replace(count=len(devices), devices=devices)


def _examples() -> str:
    return ", ".join(EXAMPLES)


def _tpu_devices(name: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "Plans for TPUs need libtpu, which compiles for them: pip install 'seqlab[plan]'."
        )
    # libtpu would look for the machine it is on, and complain on a machine without a TPU
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:  # what the compiler raises is a RuntimeError
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no topology {name!r} ({reason}): write it like {_examples()}."
        ) from None
