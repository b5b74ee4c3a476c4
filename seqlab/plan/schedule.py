"""What a compiled TPU program does, read from its scheduled HLO: collectives, and cycles of work.

A schedule is a list of instructions for each computation, in the order in which they run. A loop's
body counts as often as the loop runs. A collective is overlapped where its start and its end are
two instructions and others run in between; then the compiler's own estimate of their cycles says
how much of it they hide.
"""

import collections
import functools
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2}
_BYTES |= {"u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_CALLING = ("fusion", "call", "async-start", "custom-call")
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """A collective instruction: it runs `count` times, each time with these figures.

    sent    bytes that each device sends
    result  bytes of its result on each device
    group   devices that take part together
    hidden  cycles of other work between its start and its end
    """

    kind: str
    count: int
    sent: float
    result: int
    group: int
    hidden: int
    scope: str

    @property
    def overlapped(self) -> bool:
        return self.hidden > 0


class Kernel(NamedTuple):
    """A kernel of our own, of which the compiler estimates nothing: it runs `count` times, and each
    time keeps the matrix units busy for `flops` and moves `bytes`."""

    name: str
    count: int
    flops: int
    bytes: int


class Schedule(NamedTuple):
    """All collectives and kernels of a program, and the cycles that the compiler estimates for all
    else."""

    collectives: tuple[Collective, ...]
    cycles: int
    kernels: tuple[Kernel, ...] = ()

    def totals(self) -> list[dict]:
        """A row a kind: how many run, bytes each device sends in them, how many are overlapped."""
        rows = collections.defaultdict(lambda: {"count": 0, "sent": 0.0, "overlapped": 0})
        for c in self.collectives:
            row = rows[c.kind]
            row["count"] += c.count
            row["sent"] += c.count * c.sent
            row["overlapped"] += c.count * c.overlapped
        return [{"kind": kind, **rows[kind]} for kind in KINDS if kind in rows]


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str


def read(text: str) -> Schedule:
    """The schedule in the text of a compiled TPU program."""
    program = _Program(text)
    collectives, kernels, cycles = [], [], 0
    for name, times in program.runs().items():
        collectives += program.collectives(program.computations[name], times)
        kernels += program.kernels(name, times)
        cycles += times * program.cycles(name)
    return Schedule(tuple(collectives), cycles, tuple(kernels))


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry, current = "", []
        for line in text.splitlines():
            if opening := _COMPUTATION.match(line):
                current = self.computations[opening[2]] = []
                self.entry = opening[2] if opening[1] else self.entry
            elif instruction := _INSTRUCTION.match(line):
                current.append(_Instruction(*instruction.groups()))
        self.inside = functools.cache(self._inside)

    def runs(self) -> dict[str, int]:
        """How often each scheduled computation runs. Of a conditional's branches the longest."""
        runs: dict[str, int] = collections.Counter({self.entry: 1})
        queue = [(self.entry, 1)]
        while queue:
            name, times = queue.pop()
            for i in self.computations[name]:
                inner = times * (self._trips(i) if i.op == "while" else 1)
                called = _scheduled(i)
                if i.op == "conditional":
                    called = [max(called, key=self.cycles)]
                for computation in called:
                    runs[computation] += inner
                    queue.append((computation, inner))
        return runs

    def cycles(self, computation: str) -> int:
        return sum(map(_cycles, self.computations[computation]))

    def kernels(self, computation: str, times: int) -> list[Kernel]:
        costs = [(i.name, _COST.search(i.rest)) for i in self.computations[computation]]
        return [Kernel(name, times, *map(int, cost.groups())) for name, cost in costs if cost]

    def spent(self, i: _Instruction) -> int:
        """Cycles of one instruction; of a loop, those of all its turns."""
        if i.op != "while":
            return _cycles(i)
        return self._trips(i) * sum(map(self.spent, self.computations[_scheduled(i)[0]]))

    def collectives(self, instructions: list[_Instruction], times: int) -> list[Collective]:
        """Those of one computation; one that is spread over several instructions (a start, others
        that carry it on beside work of their own, a done) has one channel in all of them."""
        spans: dict[tuple, list] = {}
        started: dict[str, tuple] = {}
        for at, i in enumerate(instructions):
            for c in self.inside(i):
                channel = None if c is i and i.op.endswith("-start") else _CHANNEL.search(c.rest)
                key = _kind(c), channel[1] if channel else c.name
                spans.setdefault(key, [c, at, at])[2] = at
                started[i.name] = key
            operand = i.rest.removeprefix("%").partition(")")[0]
            if i.op.endswith("-done") and operand in started:
                spans[started[operand]][2] = at
        return [
            _collective(c, sum(map(self.spent, instructions[first + 1 : last])), times)
            for c, first, last in spans.values()
        ]

    def _inside(self, i: _Instruction) -> list[_Instruction]:
        """The collectives that an instruction is, or that the computations it calls hold."""
        if _kind(i):
            return [] if i.op.endswith("-done") else [i]
        return [
            c
            for called in (_CALLED.findall(i.rest) if i.op in _CALLING else ())
            for inner in self.computations.get(called, ())
            for c in self.inside(inner)
        ]

    def _trips(self, loop: _Instruction) -> int:
        """Loops count from 0 up to the constant that their condition compares with."""
        [condition] = re.findall(r"condition=%?([\w.\-]+)", loop.rest)
        constants = [
            int(i.rest.partition(")")[0])
            for i in self.computations[condition]
            if i.op == "constant" and i.shape.startswith("s32[]")
        ]
        return max(constants, default=1)


def _scheduled(i: _Instruction) -> list[str]:
    """The computations that an instruction runs one after the other, as a loop does its body."""
    if i.op == "while":
        return re.findall(r"body=%?([\w.\-]+)", i.rest)
    if i.op == "conditional":
        branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.rest)
        for several in re.findall(r"branch_computations=\{([^}]*)\}", i.rest):
            branches += re.findall(r"[\w.\-]+", several)
        return branches
    return _CALLED.findall(i.rest) if i.op == "call" else []


def _kind(i: _Instruction) -> str | None:
    kind = re.sub("-(start|done)$", "", i.op)
    return kind if kind in KINDS else None


def _cycles(i: _Instruction) -> int:
    found = _CYCLES.search(i.rest)
    return int(found[1]) if found else 0


def _collective(c: _Instruction, hidden: int, times: int) -> Collective:
    kind, group = str(_kind(c)), _group(c)
    # a start's shape is a tuple of its operands, its results, and semaphores
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(c.shape)]
    large = [size for size in arrays if size > 4]
    started = c.op.endswith("-start") and kind in ("all-gather", "collective-permute")
    result = sum(large[len(large) // 2 :] if started else arrays)
    sent = {
        "all-gather": result * (group - 1) / group,
        "all-reduce": 2 * result * (group - 1) / group,
        "reduce-scatter": result * (group - 1),
        "all-to-all": result * (group - 1) / group,
        "collective-permute": result,
    }[kind]
    scope = _SCOPE.search(c.rest)
    return Collective(kind, times, sent, result, group, hidden, scope[1] if scope else "")


def _group(c: _Instruction) -> int:
    found = _GROUPS.search(c.rest)
    if not found:
        return 2  # a permutation: one sender and one receiver
    return int(found[1]) if found[1] else len(found[2].split(","))


def _array_bytes(dtype: str, sizes: str) -> int:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
