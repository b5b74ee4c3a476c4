"""Numbers as a person reads them: 12.3k, 1.4 MiB, 3:07."""

import math
from collections.abc import Iterable


def count(value: float) -> str:
    """Three significant digits with k, M, G or T; whole below 1000: 999, 12.3k, 2.35M."""
    if abs(value) < 999.5:
        return f"{value:.0f}"
    power = min(4, int(math.log10(abs(value) * 1.0005) // 3))
    short = value / 1000**power
    return f"{short:.{max(0, 2 - int(math.log10(abs(short) * 1.0005)))}f}{' kMGT'[power]}"


def size(value: float) -> str:
    """Bytes with a binary unit: 512 B, 64 KiB, 1.4 MiB."""
    power = min(4, int(math.log2(abs(value)) // 10)) if abs(value) >= 1 else 0
    short = value / 1024**power
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{short:.0f} {unit}" if short >= 100 or short == int(short) else f"{short:.1f} {unit}"


def clock(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or d h:mm:ss, as a clock shows them: 3:07, 1:02:03, 2d 4:05:06."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def duration(seconds: float) -> str:
    """Seconds in two units at most: 42s, 5m 12s, 3h 20m, 2d 4h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in order, those that follow one another drawn together: 0-2, 4, 6-7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
