"""Reports, and mixers found by name or in a file."""

import io

import jax
import pytest
import rich.console
from pydantic.dataclasses import dataclass

from seqlab.conformance import Report, Row, check, devices, load_mixer
from seqlab.conformance.suite import PROPERTIES, examine, title
from seqlab.conformance.trial import Trial
from seqlab.errors import ConfigError
from tests.broken_mixers import Config, Healthy


def test_a_report_tells_its_verdict_and_every_row(monkeypatch):
    few = PROPERTIES[1:4]
    monkeypatch.setattr("seqlab.conformance.suite.PROPERTIES", few)
    healthy = check(Config())
    assert healthy.passed
    lines = str(healthy).splitlines()
    assert lines[0] == "broken_mixers: every property holds"
    assert [line[6:].split("  ")[0] for line in lines[1:]] == list(map(title, few))
    assert (
        healthy.row("state shape is fixed").note == "388 bytes per sequence"
    )  # (2 * 32 + 32) floats and a count


def test_failed_and_skipped_rows_show_in_text_and_table():
    rows = (
        Row("one", True, 1e-7, 1e-5, ""),
        Row("two", False, 0.5, 0.0, "y [B, T]"),
        Row("three", None, None, None, "only one device here"),
        Row("four", False, float("inf"), 0.0, "not finite"),
        Row("five", False, float("nan"), 0.0, "neither"),
    )
    report = Report("mine", rows)
    assert not report.passed
    assert str(report).splitlines()[0] == "mine: 3 of 5 properties FAIL (1 skipped)"
    console = rich.console.Console(file=io.StringIO(), width=120)
    console.print(report.table())
    text = console.file.getvalue()
    assert all(error in str(report) and error in text for error in (" inf ", " nan "))
    assert "5.0e-01" in text and "y [B, T]" in text and "only one device here" in text


def test_rows_are_told_as_they_come(monkeypatch):
    few = PROPERTIES[1:3]
    monkeypatch.setattr("seqlab.conformance.suite.PROPERTIES", few)
    told = []
    report = check(Config("GrowsItsState"), on_row=told.append)
    assert tuple(told) == report.rows and [r.property for r in told] == list(map(title, few))
    assert not report.passed


@dataclass(frozen=True)
class Sized:
    chunk_size: int = 64
    window: int = 10
    max_length: int = 8

    def build(self, d_model, *, rngs):
        return Healthy(self, d_model, rngs=rngs)


def test_sizes_are_made_to_fit_the_trial_and_the_report_says_so():
    made = Trial(Sized())
    assert made.config == Sized(chunk_size=16, window=10, max_length=80)
    assert made.adjusted == ["chunk_size=16", "max_length=80"]


def test_one_device_skips_the_sharded_row_with_a_reason(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    found = examine(devices.sharded_equals_one_device, Trial(Config()))
    assert (found.passed, found.note) == (None, "only one device here")


@dataclass(frozen=True)
class Unbuildable:
    def build(self, d_model, *, rngs):
        raise ZeroDivisionError("no heads")


def test_a_config_that_builds_nothing_is_one_sentence():
    with pytest.raises(ConfigError, match=r"d_model=32: ZeroDivisionError: no heads\.$"):
        check(Unbuildable())
    with pytest.raises(ConfigError, match="multiple of 4 from 24 up"):
        check(Config(), length=8)


MINE = """
from pydantic.dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    heads: int = 2

    def build(self, d_model, *, rngs): ...
"""


def test_a_mixer_file_is_loaded_with_its_fields_overridden(tmp_path):
    file = tmp_path / "my_own_mixer.py"
    file.write_text(MINE)
    assert load_mixer(file).heads == 2
    assert load_mixer(str(file), ["heads=8"]).heads == 8


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        (None, [], "There is no mixer file"),
        ("x = 1", [], "defines no mixer: it needs a dataclass Config"),
        ("1 / 0", [], "raised ZeroDivisionError: division by zero"),
        ("def broken(:", [], "raised SyntaxError"),
        (MINE.replace(" = 2", ""), [], "lacks the field 'heads'"),
        ("class Config:\n    def build(self, d_model, *, rngs): ...", [], "dataclass"),
        (MINE.replace("def build", "def make"), [], "dataclass"),
        (MINE, ["haeds=2"], "did you mean 'heads'"),
        (MINE, ["heads=many"], "heads = 'many' is wrong"),
        (MINE, ["heads"], "name=value"),
    ],
    ids=range(10),
)
def test_a_broken_mixer_file_is_one_sentence(tmp_path, text, fields, message):
    file = tmp_path / f"{tmp_path.name}.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_mixer(file, fields)
    assert "\n" not in str(raised.value)


def test_an_unknown_mixer_is_one_sentence():
    with pytest.raises(ConfigError, match="There is no mixer 'no_such_thing'"):
        load_mixer("no_such_thing")


def test_a_file_named_like_a_module_is_refused(tmp_path):
    file = tmp_path / "json.py"
    file.write_text(MINE)
    with pytest.raises(ConfigError, match="'json' is loaded already: rename"):
        load_mixer(file)
