import json
import math
import os
import struct
import sys
import types

import numpy as np
import pytest

from seqlab.errors import ConfigError, DataError
from seqlab.train.metrics import MetricsFile, read
from seqlab.train.sinks import Sinks, TensorBoard, WandB, open_sinks


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def logged(path, steps):
    file = MetricsFile(path)
    for step in steps:
        file.log(step, {"loss": 1 / step})
    return file


def test_a_row_is_in_the_file_when_log_returns(path):
    file = MetricsFile(path)
    file.log(3, {"loss": 1.5, "tokens": 4096})
    file.sync()
    assert read(path) == [{"step": 3, "loss": 1.5, "tokens": 4096}]
    file.close()


def test_a_file_cut_at_any_byte_is_whole_after_reopening(path):
    logged(path, [1, 2]).close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        file = MetricsFile(path)
        file.log(9, {})
        file.close()
        kept = 1 * (cut >= first) + 1 * (cut == len(whole))
        assert [row["step"] for row in read(path)] == [1, 2][:kept] + [9]


def test_a_row_half_written_is_not_read(path):
    logged(path, [1]).close()
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    assert [row["step"] for row in read(path)] == [1]


def test_a_damaged_line_is_left_out(path):
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n[3]\n{"step": 4}\n')
    assert [row["step"] for row in read(path)] == [1, 4]


def test_a_resumed_run_writes_no_step_twice(path):
    file = logged(path, [1, 2, 3, 4, 5])
    before = path.read_bytes()
    file.truncate_after(3)
    assert before.startswith(path.read_bytes())
    for step in (4, 5):
        file.log(step, {"loss": 1 / step})
    file.close()
    assert path.read_bytes() == before


def test_rows_of_the_kept_step_itself_stay(path):
    file = logged(path, [1, 2])
    file.log(2, {"held_out_loss": 1.0})
    file.log(3, {})
    file.truncate_after(2)
    file.close()
    assert [row["step"] for row in read(path)] == [1, 2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_written_as_null(path, bad):
    file = MetricsFile(path)
    file.log(1, {"loss": bad, "norms": [bad, np.float32(0.5)], "tokens": np.int64(7)})
    file.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "norms": [None, 0.5], "tokens": 7}


def test_a_full_disk_leaves_whole_lines_only(path, monkeypatch):
    file = logged(path, [1])
    raw = file._file

    class Full:
        def write(self, line):
            return raw.write(line[:5])

        def __getattr__(self, name):
            return getattr(raw, name)

    file._file = Full()
    with pytest.raises(OSError, match="No space"):
        file.log(2, {})
    file._file = raw
    file.log(3, {})
    file.close()
    assert [row["step"] for row in read(path)] == [1, 3]
    assert path.read_bytes().count(b"\n") == 2


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="choose a run folder"):
        MetricsFile(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(DataError, match="give the path of a run"):
        read(tmp_path / "none.jsonl")


class Broken:
    def __init__(self):
        self.calls = 0

    def log(self, step, row):
        self.calls += 1
        raise ConnectionError("no route\nto host")

    def sync(self):
        pass

    def close(self):
        pass


def test_a_failing_sink_warns_once_and_the_others_go_on(path):
    said, broken = [], Broken()
    sinks = Sinks([broken, MetricsFile(path)], said.append)
    for step in range(1, 100):
        sinks.log(step, {"loss": 1.0})
    assert said == ["Broken failed (ConnectionError: no route to host); training goes on."]
    sinks.log(100, {"loss": 1.0})
    assert len(said) == 2 and "100 times" in said[1]
    sinks.sync()
    sinks.close()
    assert broken.calls == len(read(path)) == 100


def events(folder):
    """The event files below a folder as (step, {tag: value}), read by their format."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir(), key=os.path.getmtime):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}
            data = data[16 + length :]


def test_tensorboard_events_hold_the_finite_numbers(tmp_path):
    board = TensorBoard(tmp_path)
    board.log(1, {"step": 1, "loss": 2.5, "grad_norm": math.nan, "note": "text", "lr": None})
    board.log(1, {"held_out_loss": 3.0})
    assert [row for row in events(tmp_path) if row[1]] == [
        (1, {"train/loss": 2.5}),
        (1, {"held_out/loss": 3.0}),
    ]
    board.close()


def test_a_run_resumed_at_once_keeps_the_events_before_it(tmp_path):
    for start in (0, 1):
        board = TensorBoard(tmp_path, start)
        board.log(start + 1, {"loss": 1.0})
        board.close()
    assert [step for step, values in events(tmp_path) if values] == [1, 2]


def test_without_tensorboardx_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "tensorboardX.event_file_writer", raising=False)
    said = []
    sinks = open_sinks(tmp_path, warn=said.append)
    for step in (1, 2):
        sinks.log(step, {"loss": 1.0})
    sinks.close()
    assert len(said) == 1 and "pip install 'seqlab[track]'" in said[0]
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_opened_sinks_drop_what_the_run_writes_again(tmp_path):
    for start in (0, 2):
        sinks = open_sinks(tmp_path, start_step=start)
        for step in range(start + 1, 5):
            sinks.log(step, {"loss": 1.0})
        sinks.close()
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())


def test_weights_and_biases_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end")
    )
    wandb = types.SimpleNamespace(init=lambda **options: seen.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = WandB("lab", tmp_path / "demo", {"steps": 4})
    sink.log(1, {"step": 1, "loss": 2.0, "lr": math.inf})
    sink.close()
    assert seen[0]["id"] == "demo" and seen[0]["resume"] == "allow"
    assert seen[1:] == [(1, {"train/loss": 2.0}), "end"]


def test_a_sink_that_does_not_open_is_left_out(tmp_path, monkeypatch):
    def refuse(**options):
        raise TimeoutError("no answer in 90 s")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    said = []
    open_sinks(tmp_path, wandb_project="lab", tensorboard=False, warn=said.append).close()
    assert said == ["Weights & Biases is off (TimeoutError: no answer in 90 s)."]
