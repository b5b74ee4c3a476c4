import json
import math
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from seqlab.train import charts
from seqlab.train.metrics import MetricsFile
from seqlab.train.report import headline, wall_time, write_report

TABLE = [
    {"block": "embedding", "mixer": "", "parameters": 1000, "state_bytes": None},
    {"block": "0", "mixer": "gla", "parameters": 2000, "state_bytes": 4096},
    {"block": "1", "mixer": "mamba2", "parameters": 3500, "state_bytes": 1024},
]
ZLIB = {"zlib -9": 2.042}


def rows(steps, bad=()):
    """Rows as a run writes them, with an evaluation every fifth step."""
    for step in range(1, steps + 1):
        loss = math.nan if step in bad else 1.2 + 4 * math.exp(-step / 20)
        yield {
            "step": step,
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "lr": 1e-3,
            "grad_norm": math.inf if step in bad else 50.0 if step == 1 else 0.5,
            "tokens": 4096 * step,
            "tokens_per_second": 20_000.0,
            "data_wait": 0.01,
            "seconds": 30.0 + step,
        }
        if step % 5 == 0:
            yield {"step": step, "held_out_loss": 1.3, "held_out_bits_per_byte": 1.8755}


def run(folder, written):
    file = MetricsFile(folder / "metrics.jsonl")
    for row in written:
        file.log(row["step"], row)
    file.close()
    return folder


class Page(HTMLParser):
    """The tags, links and text of a page; checks that tags close in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(path.read_text("utf-8"))
        assert not self.open
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.mark.parametrize("steps", [0, 1, 2, 60])
def test_a_report_of_any_number_of_steps_is_whole(tmp_path, steps):
    run(tmp_path, rows(steps, bad=(2, 40)))
    path = write_report(
        tmp_path, title="demo", model_table=TABLE, facts={"Seed": 0}, baselines=ZLIB
    )
    page = Page(path)
    assert {tmp_path / link for link in page.links} <= set(tmp_path.iterdir())
    assert sum(link.endswith(".png") for link in page.links) == 2 * len(charts.CHARTS)
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.01
    assert "6,500" in page.text and "5 KiB" in page.text


def test_a_folder_without_metrics_gets_a_report(tmp_path):
    assert "no evaluation yet" in Page(write_report(tmp_path, title="empty")).text


def test_the_headline_compares_with_the_first_baseline():
    tiles = headline(list(rows(10)), 6500, ZLIB)
    assert tiles[0] == ("Held-out bits per byte", "1.875", "8.2% below zlib -9 (2.042)")
    assert [figure for _, figure, _ in tiles[1:]] == ["6.50k", "41.0k", "40s", "20.0k"]
    worse = headline(list(rows(10)), 6500, {"xz": 1.5})
    assert worse[0][2] == "25.0% above xz (1.500)"


def test_the_baseline_is_labelled_in_its_chart(tmp_path):
    shown = {}
    for chart in charts.CHARTS:
        lines = ZLIB if chart.key == "bits_per_byte" else {}
        figure = charts._figure(chart, charts.THEMES[0], list(rows(60)), lines)
        (axes,) = figure.axes
        shown[chart.name] = [t.get_text() for t in axes.legend_.texts] if axes.legend_ else []
    assert any("zlib -9" in label and "2.042" in label for label in shown["bits_per_byte"])
    assert not any("zlib" in label for label in shown["loss"])


def test_foreign_text_is_shown_and_never_obeyed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "</pre><script>3</script>"}))
    nasty = "<script>alert(1)</script>&amp;\x1b[31m\x00\u202e\ud800\ttab\nline"
    path = write_report(
        tmp_path,
        title=nasty,
        model_table=[{"block": nasty, "mixer": nasty, "parameters": 1, "state_bytes": 1}],
        facts={nasty: nasty},
        samples=[nasty, {"prompt": nasty, "text": nasty, "note": nasty}],
        baselines=ZLIB,
    )
    page = Page(path)
    assert "script" not in page.tags
    seen = r"<script>alert(1)</script>&amp;\x1b[31m\x00\u202e\ud800" + "\ttab\nline"
    assert page.text.count(seen) == 10
    assert "</pre><script>3</script>" in page.text


def test_the_frame_ignores_the_first_steep_part_and_outliers():
    steps = np.arange(1.0, 1001.0)
    values = 1.5 + 9 * np.exp(-steps / 10)
    values[500] = 1e6
    chart, none = charts.CHARTS[0], charts.Curve(np.zeros(0), np.zeros(0))
    low, high, _ = charts.frame(chart, charts.Curve(steps, values), none, [2.042])
    assert low < 1.5 and 2.042 < high < 2.5


def test_only_gradient_norms_over_decades_get_a_logarithmic_axis():
    chart = next(chart for chart in charts.CHARTS if chart.scale == "norm")
    for top, log in ((3.0, False), (900.0, True)):
        values = np.geomspace(1.0, top, 200)
        written = [{"step": i, "grad_norm": v} for i, v in enumerate(values)]
        (axes,) = charts._figure(chart, charts.THEMES[1], written, {}).axes
        assert (axes.get_yscale() == "log") is log


def test_a_run_whose_every_loss_is_lost_has_a_report(tmp_path):
    path = write_report(run(tmp_path, rows(3, bad=(1, 2, 3))), title="lost", baselines=ZLIB)
    assert "Steps without a finite loss" in Page(path).text


def test_a_smoothed_curve_keeps_its_ends_and_drops_spikes():
    steps = np.arange(400.0)
    values = np.where(steps == 200, 1e9, 3.0)
    values[300] = np.nan
    smooth = charts.smoothed(charts.Curve(steps, values))
    assert smooth.steps[0] == 0 and smooth.steps[-1] == 399
    assert np.all(smooth.values == 3.0)


def test_a_step_that_stands_twice_counts_once():
    twice = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}]
    curve = charts.curve(twice, "loss")
    assert curve.steps.tolist() == [1, 2] and curve.values.tolist() == [5.0, 3.0]


def test_wall_time_adds_up_over_resumed_runs():
    clocks = [5.0, 10.0, 2.0, 9.0]
    assert wall_time([{"step": i, "seconds": s} for i, s in enumerate(clocks)]) == 19.0
    assert wall_time([]) == 0.0
