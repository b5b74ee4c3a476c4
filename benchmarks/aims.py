"""How many times as fast as a peer we mean to be: on a CPU about what prototypes of the same forms,
written before the kernels here, reached beside the same peers; on a GPU five sixths."""

from typing import Any

TRAINING, PREFILL, DECODE = "a step of training", "prefill, 6 layers", "decode, 6 layers"
FORWARD, BOTH = "forward", "forward and backward"

#: By what is raced and in which pass; 1 for what is not listed.
AIMS = {
    ("mamba", TRAINING): 5.0,
    ("mamba, mamba.py", TRAINING): 2.3,
    ("mamba2", TRAINING): 1.5,
    ("xlstm", TRAINING): 1.1,
    ("qwen3_next", TRAINING): 1.2,
    ("llama", TRAINING): 0.9,
    ("mlstm", BOTH): 1.64,
    ("gated delta rule", FORWARD): 1.23,
    ("gated delta rule", BOTH): 1.59,
    ("selective scan", FORWARD): 7.7,
    ("selective scan", BOTH): 3.65,
    ("llama", PREFILL): 0.74,
    ("mamba2", PREFILL): 1.82,
    ("llama", DECODE): 1.36,
    ("mamba2", DECODE): 3.3,
    **{(name, BOTH): 0.83 for name in ("GLA", "Mamba-2", "mLSTM", "Gated DeltaNet")},
}


def aim(row: dict[str, Any]) -> float:
    return AIMS.get((row.get("what") or row["model"], row.get("pass", TRAINING)), 1.0)


def reached(row: dict[str, Any]) -> float:
    """The ratio that counts: of CPU seconds where other work kept the machine busy."""
    busy = row.get("load", 0) > row.get("cores", 1) + 1
    return row["ratio of CPU seconds" if busy else "ratio"]


def holds(row: dict[str, Any]) -> bool:
    """To two digits, as figures are shown."""
    return round(reached(row), 2) >= aim(row)
