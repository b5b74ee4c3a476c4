"""Mixers compared on a task: what is trained, kept, drawn, and said of bad input."""

import dataclasses
import io
import json
import math
import re

import jax
import numpy as np
import pytest
import typer.testing
from rich.console import Console

from seqlab import cli, settings, tasks
from seqlab.compare import budget, command, entries, pictures, published, report, results, trial
from seqlab.compare.budget import Budget
from seqlab.compare.results import Result, Run
from seqlab.errors import ConfigError
from seqlab.layers.registry import own_mixers
from seqlab.tasks import Accuracy, Examples, mqar
from seqlab.tasks.contract import Protocol
from seqlab.train.lock import RunLock

SHORT, LONG = mqar.Config(32, 16, 2), mqar.Config(32, 24, 4)
TINY = Protocol(
    train=((SHORT, 64), (LONG, 24)),
    test=(("24/4", LONG, 12), ("16/2", SHORT, 12)),
    steps=4,
    batch=8,
    lr=(1e-2,),
    conv_first=True,
)
MIXERS = "linear_attention(heads=2),gla(heads=2,decay_rank=4)"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(command, "protocol", lambda task, name: TINY)


def compare(out, mixers=MIXERS, **options) -> tuple[list[Result], str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    return command.compare("mqar", mixers, out=out, width="8", console=console, **options), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two mixers at two rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "protocol", lambda task, name: TINY)
        out = tmp_path_factory.mktemp("compared")
        return out, *compare(out, lr="1e-2,1e-3")


def test_a_comparison_leaves_a_page_its_pictures_and_its_numbers(finished):
    out, found, said = finished
    names = ["accuracy_state.png", "accuracy_state.dark.png", "accuracy_length.png"]
    assert all((out / name).stat().st_size > 10_000 for name in names)
    html = (out / "compare.html").read_text("utf-8")
    assert all(label in html for label in ("linear_attention(heads=2)", "24/4", "Zoology"))
    assert "http" not in html and re.findall(r'src="(\S+)"', html) == [names[0], names[2]]
    rows = json.loads((out / "results.json").read_text("utf-8"))
    assert {row["label"] for row in rows} == {result.label for result in found}
    lines = said.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("linear_attention(heads=2) ")
    assert "\x1b" not in said.getvalue()


def test_the_bytes_of_state_are_those_of_the_state(finished):
    _, found, _ = finished
    for result in found:
        model = settings.read(entries.lm.Config, result.model).build(rngs=entries.nnx.Rngs(0))
        assert result.state_bytes == sum(a.nbytes for a in jax.tree.leaves(model.init_state(1)))


def test_every_mixer_sees_the_same_batches_and_each_rate_counts(finished):
    _, found, _ = finished
    for result in found:
        assert [(run.lr, run.seed, run.steps) for run in result.runs] == [(1e-3, 0, 4), (1e-2, 0, 4)]
        assert result.accuracy == max(run.accuracy for run in result.runs)
        assert len({run.loss for run in result.runs}) == 2
