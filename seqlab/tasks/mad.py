"""The protocols of MAD (Poli et al., 2024): a baseline, then one factor changed at a time."""

import dataclasses
from typing import Any

from seqlab.tasks.contract import Protocol

EPOCHS = 200
BATCH = 128


def protocols(
    learnt: Any, asked: dict[str, Any] | None = None, count: int = 12_800, **changes: tuple
) -> dict[str, Protocol]:
    """The baseline, "mad", and `mad_FIELD_VALUE` for every one of the `changes`.

    Tests are drawn with the fields `asked`. The change called `examples` is of their number. The
    paper takes the better of the weight decays 0 and 0.1; a protocol has one, the second.
    """

    def one(count: int, **fields: Any) -> Protocol:
        train = dataclasses.replace(learnt, **fields)
        return Protocol(
            train=((train, count),),
            test=(("test", dataclasses.replace(train, **(asked or {})), 1280),),
            steps=EPOCHS * -(-count // BATCH),
            batch=BATCH,
            lr=(1e-4, 5e-4, 1e-3),
            final_lr=1e-3,
            widths=(128,),
            ffn=True,
        )

    known = {"mad": one(count)}
    for name, values in changes.items():
        for value in values:
            change = {"count": value} if name == "examples" else {"count": count, name: value}
            known[f"mad_{name}_{value}"] = one(**change)
    return known


def small(learnt: Any, asked: Any, steps: int = 1_000) -> Protocol:
    """The protocol for a CPU."""
    return Protocol(
        train=((learnt, 8_192),),
        test=(("test", asked, 512),),
        steps=steps,
        batch=64,
        lr=(3e-3,),
        ffn=True,
    )
