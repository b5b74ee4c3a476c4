import io
import math
import re

import pytest
from rich.console import Console

from seqlab.train import readable
from seqlab.train.progress import Progress


def row(step, loss=2.0, **more):
    return {
        "step": step,
        "loss": loss,
        "bits_per_byte": loss / math.log(2),
        "tokens": 4096 * step,
        "tokens_per_second": 12345.0,
        "data_wait": 0.03,
        "seconds": 20.0 + step,
        **more,
    }


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain(total, start=0, clock=None):
    out = io.StringIO()
    return Progress(total, start, Console(file=out, width=80), now=clock or Clock()), out


def terminal(width=80):
    out = io.StringIO()
    terminal = {"force_terminal": True, "force_interactive": True, "color_system": "truecolor"}
    return Console(file=out, width=width, **terminal), out


def shown(progress, width=80):
    """The lines of the bar, colours left out."""
    console, out = terminal(width)
    console.print(progress._render())
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()


def test_plain_lines_say_everything_without_control_codes():
    progress, out = plain(2)
    with progress:
        progress.update(row(1))
        progress.update(row(2))
        progress.update({"step": 2, "held_out_loss": 1.0, "held_out_bits_per_byte": 1.4427})
        progress.note("saved step 2 in [runs/demo]")
    assert out.getvalue().splitlines() == [
        "compiling ...",
        "step 1/2  loss 2.0000  bits/byte 2.885  12.3k tokens/s  data wait 3%  ETA -  elapsed 0:00",
        "step 2/2  loss 2.0000  bits/byte 2.885  12.3k tokens/s  data wait 3%  ETA 0:00  "
        "elapsed 0:00",
        "step 2: held-out loss 1.0000, 1.4427 bits/byte",
        "saved step 2 in [runs/demo]",
    ]


def test_plain_lines_come_every_fiftieth_of_the_run_or_every_ten_seconds():
    clock = Clock()
    progress, out = plain(5000, clock=clock)
    for step in range(1, 202):
        progress.update(row(step))
    assert [line.split()[1] for line in out.getvalue().splitlines()[1:]] == [
        "1/5,000",
        "101/5,000",
        "201/5,000",
    ]
    clock.now = 10.0
    progress.update(row(202))
    assert out.getvalue().splitlines()[-1].startswith("step 202/5,000")


def test_the_estimate_counts_evaluations_but_not_compilation():
    progress, out = plain(100)
    progress.update(row(1, seconds=60.0))
    progress.update(row(2, seconds=61.0))
    progress.update(row(3, seconds=64.0))  # an evaluation took two seconds
    assert progress._left() == 97 * 2.0


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_the_terminal(width):
    progress = Progress(100_000, console=terminal(width)[0], now=Clock())
    with progress:
        assert shown(progress, width)[1].strip() == "compiling…"
        for step in range(1, 12_346):
            progress.update(row(step))
        progress.update({"step": 9, "held_out_loss": 1.0, "held_out_bits_per_byte": 1.4427})
        top, figures = shown(progress, width)
    assert len(top) <= width and "step  12,345/100,000" in top and "12%" in top and "ETA" in top
    assert "━" * (width // 5) in top
    assert figures.split("   ") == [
        "loss 2.0000",
        "bits/byte 2.885",
        "12.3k tokens/s",
        "data wait 3%",
        "held-out 1.443",
    ]


def test_notes_stand_above_the_bar_and_the_cursor_comes_back():
    console, out = terminal()
    progress = Progress(10, console=console, now=Clock())
    progress.update(row(1))
    progress.note("saved step 1")
    progress.close()
    progress.close()
    text = out.getvalue()
    assert "saved step 1" in text and text.rindex("saved step 1") < text.rindex("step  1/10")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_loss_that_is_not_finite_is_seen_and_forgotten():
    progress, _ = plain(9)
    progress.update(row(1, loss=3.0))
    progress.update(row(2, loss=math.nan))
    assert "loss nan" in progress._line()
    progress.update(row(3, loss=3.0))
    assert "loss 3.0000" in progress._line()
    progress.update(row(4) | {"loss": None, "bits_per_byte": None})
    assert "loss nan" in progress._line()


def test_a_pipe_that_nobody_reads_does_not_stop_training():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError("gone")

    progress = Progress(3, console=Console(file=Gone()), now=Clock())
    progress.update(row(1))
    progress.note("saved")
    progress.close()


def test_a_resumed_run_begins_where_it_was():
    with Progress(10, 5, terminal()[0], now=Clock()) as progress:
        assert "50%" in shown(progress)[0]


def test_numbers_read_well():
    counts = [0, 999, 1000, 9999, 12_345, 999_600, 2_345_678, 7e12]
    assert list(map(readable.count, counts)) == [
        "0",
        "999",
        "1.00k",
        "10.0k",
        "12.3k",
        "1.00M",
        "2.35M",
        "7.00T",
    ]
    assert list(map(readable.size, [0, 512, 65536, 1_500_000])) == [
        "0 B",
        "512 B",
        "64 KiB",
        "1.4 MiB",
    ]
    assert list(map(readable.clock, [7, 187, 3723, 100_000])) == [
        "0:07",
        "3:07",
        "1:02:03",
        "1d 3:46:40",
    ]
    assert list(map(readable.duration, [42, 312, 12_000, 187_200])) == [
        "42s",
        "5m 12s",
        "3h 20m",
        "2d 4h",
    ]


def test_a_run_with_a_name_and_a_loss_that_is_no_text_says_so():
    out = io.StringIO()
    console = Console(file=out, width=80)
    with Progress(2, 0, console, name="1-layer", now=Clock()) as progress:
        progress.update({name: value for name, value in row(1).items() if name != "bits_per_byte"})
    assert out.getvalue().splitlines() == [
        "1-layer  compiling ...",
        "1-layer  step 1/2  loss 2.0000  12.3k tokens/s  data wait 3%  ETA -  elapsed 0:00",
    ]
