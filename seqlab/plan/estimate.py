"""How long a compiled program takes, and whether it fits."""

import collections
from typing import NamedTuple

from seqlab.parallel.cost import Link
from seqlab.plan.programs import Program
from seqlab.plan.schedule import Collective, Kernel
from seqlab.plan.topology import Device, Topology

FORMULA = (
    "time = max(work, products at the device's peak) + exposed communication. Work is the "
    "compiler's own estimate of each instruction's cycles (the slower of its arithmetic and its "
    "memory traffic), times how often it runs, over the clock; for a kernel of ours, of which it "
    "estimates nothing, the longer of its products at the peak and its memory traffic. A "
    "collective takes its link's latencies and bytes sent / bandwidth; exposed is what exceeds "
    "the work scheduled between its start and its end, and all of it where it does not overlap. "
    "Links are assumptions (see parallel/cost.py); nothing was timed."
)
#: Forward and backward take three times the products of forward alone; recomputing is not counted.
PASSES = 3


class Estimate(NamedTuple):
    """Seconds of one run of a program, None where it could not be compiled.

    products  what its products would take at the peak; 0 where they were not counted
    mfu       products over seconds: the share of the peak that is put to use
    """

    program: Program
    fits: bool
    capacity: float  # bytes of memory of a device
    work: float | None = None
    products: float = 0.0
    exposed: float | None = None
    traffic: tuple[dict, ...] = ()

    @property
    def seconds(self) -> float | None:
        if self.work is None or self.exposed is None:
            return None
        return max(self.work, self.products) + self.exposed

    @property
    def tokens_per_second(self) -> float | None:
        return self.seconds and self.program.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        return self.products / self.seconds if self.seconds and self.products else None


def estimate(program: Program, topology: Topology, flops: int) -> Estimate:
    """`flops` are those of the program's products over all devices, 0 where not counted."""
    device, schedule = topology.device, program.schedule
    fits = program.memory is not None and program.needed <= device.memory
    if schedule is None:
        return Estimate(program, False, device.memory)
    products = flops / (topology.count * device.flops)
    clock = device.clock
    in_kernels = sum(k.count * in_kernel(k, device) for k in schedule.kernels)
    by_shape = products * device.flops / topology.link.flops
    work = schedule.cycles / clock + in_kernels if clock else by_shape
    waited = collections.defaultdict(float)
    for c in schedule.collectives:
        waited[c.kind] += c.count * exposed(c, topology.link, clock)
    rows = tuple({**row, "exposed": waited[row["kind"]]} for row in schedule.totals())
    return Estimate(program, fits, device.memory, work, products, sum(waited.values()), rows)


def in_kernel(k: Kernel, device: Device) -> float:
    """Seconds of one run of a kernel at least."""
    return max(k.flops / device.flops, k.bytes / device.bandwidth)


def travel(c: Collective, link: Link) -> float:
    """Seconds of one run of a collective by itself."""
    if c.kind == "collective-permute":
        return link.within(c.sent)
    rounds = 2 if c.kind == "all-reduce" else 1
    return rounds * (c.group - 1) * link.gather.latency + c.sent / link.gather.bandwidth


def exposed(c: Collective, link: Link, clock: float | None) -> float:
    """Seconds of one run that no work hides."""
    hidden = c.hidden / clock if clock else 0.0
    return max(0.0, travel(c, link) - hidden)
