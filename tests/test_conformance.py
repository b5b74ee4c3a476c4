"""The conformance suite catches broken mixers, each by the property that it breaks."""

import functools

import pytest

from seqlab.conformance import Row
from seqlab.conformance.suite import PROPERTIES, examine, title
from seqlab.conformance.trial import Trial
from tests.broken_mixers import (
    Config,
    ConvLeaks,
    ConvStateLeaks,
    DropsItsConvState,
    FollowsTheInputsDtype,
    GrowsItsState,
    HasADeadParameter,
    IgnoresResets,
    IgnoresTheFirstReset,
    KeepsBfloat16,
    MixesRows,
    Overflows,
    Retraces,
    RoundsItsState,
    SeesTheFuture,
    ShardsForgetTheState,
    StopsAGradient,
    WidensBfloat16,
    WrongGradient,
)

PIECES = "pieces equal the whole"
SHAPES = "state shape is fixed"
FUTURE = "future is not seen"
ROWS = "rows are independent"
PACKED = "packed documents equal separate ones"
LEAKS = "documents do not leak"
PADDING = "left padding is forgotten"
BFLOAT16 = "bfloat16 keeps a float32 state"
GRADIENTS = "gradients equal the step form"
EXTREMES = "extreme inputs stay finite"
LEARNS = "every parameter learns"
COMPILES = "compiles once per shape"
SHARDED = "sharded equals one device"
PROVE = {title(prove): prove for prove in PROPERTIES}


@functools.cache
def trial(kind: str) -> Trial:
    return Trial(Config(kind))


@functools.cache
def row(kind: str, name: str) -> Row:
    return examine(PROVE[name], trial(kind))


@pytest.mark.parametrize("name", PROVE)
def test_a_healthy_mixer_has_every_property(name):
    found = row("Healthy", name)
    assert found.passed is True, found


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (SeesTheFuture, (FUTURE, PIECES)),
        (IgnoresResets, (LEAKS, PACKED, PADDING)),
        (IgnoresTheFirstReset, (LEAKS, PIECES)),
        (GrowsItsState, (SHAPES,)),
        (ConvLeaks, (LEAKS, PACKED, PADDING)),
        (ConvStateLeaks, (LEAKS,)),
        (DropsItsConvState, (PIECES,)),
        (MixesRows, (ROWS,)),
        (KeepsBfloat16, (SHAPES,)),
        (FollowsTheInputsDtype, (BFLOAT16,)),
        (RoundsItsState, (PIECES,)),
        (WidensBfloat16, (BFLOAT16,)),
        (WrongGradient, (GRADIENTS,)),
        (Overflows, (EXTREMES,)),
        (HasADeadParameter, (LEARNS,)),
        (StopsAGradient, (LEARNS,)),
        (Retraces, (COMPILES, SHAPES)),
        (ShardsForgetTheState, (SHARDED,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_mixer_is_caught_by_the_right_row(kind, broken):
    found = [row(kind.__name__, name) for name in broken]
    assert [f.passed for f in found] == [False] * len(found), found


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (SeesTheFuture, (SHAPES, ROWS)),
        (IgnoresResets, (PIECES, FUTURE, ROWS)),
        (ConvLeaks, (PIECES, FUTURE, ROWS)),
        (MixesRows, (FUTURE, LEAKS)),
        (WrongGradient, (PIECES,)),
        (ShardsForgetTheState, (PIECES, PACKED)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_rows_do_not_blame_a_broken_mixer(kind, kept):
    found = [row(kind.__name__, name) for name in kept]
    assert [f.passed for f in found] == [True] * len(found), found


def test_an_exception_fails_its_row_in_one_line():
    found = row("Raises", PIECES)
    assert found == Row(PIECES, False, None, None, "ValueError: the kernel said no")
