"""The plots of the report; matplotlib is imported when one is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.ablation import STEPS
from bench.records import Record
from bench.stage_calls import STAGES
from bench.tables import seconds, three_digits, what_ran
from catseg_fast.files import replacing

DTYPES = ("fp32", "bf16", "fp16")
OTHERS = ("PyTorch's kernels", "no kernel runs")  # in a profile
MARKERS = {"torch": "o", "Triton": "^"}
LINE_MARKERS = "osD^vP*Xph"  # points of several runs may coincide
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "savefig.dpi": 150,
}
# A figure shows the records of one group on one device.
Draw = Callable[[Any, Sequence[Record]], None]


def draw_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the plots for which there are records, as PNG files.

    Raises:
        ModuleNotFoundError: without matplotlib (`pip install -e ".[bench]"`).
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[str, str, Draw]] = {
        "time": ("scaling", "Time of the aggregator against the number of classes", _time),
        "memory": ("scaling", "Peak memory of the aggregator, above weights and inputs", _memory),
        "steps": ("steps", "Time of the aggregator against the classes per step", _steps),
        "profile": ("scaling", "Where the time of a plain call goes", _profile),
        "roofline": ("kernels", "Roofline of the stages", _roofline),
        "ablation": ("ablation", "Time of the aggregator after each step", _ablation),
    }
    drawn = []
    for name, (group, title, draw) in plots.items():
        own = [record for record in records if record.group == group]
        found = {
            "memory": [r for r in own if r.peak_bytes is not None],
            "profile": [r for r in own if r.busy],
        }
        for number, device in enumerate(dict.fromkeys(record.device for record in found.get(name, own)), 1):
            path = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
            _save(path, title, [record for record in own if record.device == device], draw)
            drawn.append(path)
    return drawn


def _save(path: Path, title: str, records: Sequence[Record], draw: Draw) -> None:
    """Save a figure, with case and device below its title."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8, 5), layout="constrained")
        draw(figure, records)
        heading = figure.suptitle(f"{title}\n{_case(records)}\n", x=0.01, ha="left", fontsize=12)
        last_line = heading.get_window_extent().y0 / figure.bbox.height + 0.02
        figure.text(0.01, last_line, what_ran(records), va="bottom", fontsize=7, color="gray")
        with replacing(path) as temporary:
            figure.savefig(temporary)
        plt.close(figure)


def _time(figure: Any, records: Sequence[Record]) -> None:
    axes = figure.subplots()
    for style, (run, own) in _by_run(records):
        classes = [r.classes for r in own]
        axes.plot(classes, [1e3 * r.median for r in own], **style, label=run)
        spread = [
            (r.classes, 1e3 * r.p20, 1e3 * r.p80) for r in own if r.p20 is not None and r.p80 is not None
        ]
        if spread:
            axes.fill_between(*zip(*spread, strict=True), color=style["color"], alpha=0.2, linewidth=0)
    shaded = any(record.p20 is not None for record in records)
    _against_classes(figure, axes, records, "ms (median; shaded: p20 to p80)" if shaded else "ms (median)")


def _memory(figure: Any, records: Sequence[Record]) -> None:
    axes = figure.subplots()
    for style, (run, own) in _by_run(records):
        held = [(r.classes, r.peak_bytes / 2**20) for r in own if r.peak_bytes is not None]
        if held:
            axes.plot(*zip(*held, strict=True), **style, label=run)
    _against_classes(figure, axes, records, "MiB")


def _steps(figure: Any, records: Sequence[Record]) -> None:
    """Draw time by the classes per step, with the time that the GPU was busy, and the peak memory below."""
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    most = max(record.peak_bytes or 1 for record in records) / 2**20
    for style, (run, own) in _by_run(records):
        classes = [r.classes for r in own]
        axes.plot(classes, [1e3 * r.median for r in own], **style, label=run)
        held = [(r.classes, r.peak_bytes / 2**20) for r in own if r.peak_bytes is not None]
        if held:
            below.plot(*zip(*held, strict=True), **style)
    axes.set(ylabel="ms (median)", ylim=(0, 1.1e3 * max(record.median for record in records)))
    below.set(xscale="log", xlabel="classes per step", ylabel="peak MiB", ylim=(0, 1.1 * most))
    ticks = sorted({record.classes or 0 for record in records})
    below.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    below.set_xticks([], minor=True)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)


def _profile(figure: Any, records: Sequence[Record]) -> None:
    """Draw a panel per number of classes: milliseconds of each kernel in the least busy call."""
    least: dict[int, Record] = {}
    for record in sorted((r for r in records if r.busy), key=lambda record: record.busy or 0):
        least.setdefault(record.classes or 0, record)
    panels = figure.subplots(1, len(least), squeeze=False)[0]
    found = dict.fromkeys(name for record in least.values() for name in profile_parts(record))
    names = [*(name for name in found if name not in OTHERS), *OTHERS]
    for axes, (classes, record) in zip(panels, sorted(least.items()), strict=True):
        parts = profile_parts(record)
        for place, name in enumerate(names):
            value = 1e3 * parts.get(name, 0.0)
            axes.barh(place, value, color="C7" if name in OTHERS else "C0")
            axes.text(value, place, f" {three_digits(value)}", va="center")
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2e3 * max(parts.values()))
        axes.set_title(f"T={classes}: {seconds(record.median)}, {record.launches} launches", fontsize=10)
        axes.set_xlabel("ms")


def profile_parts(record: Record) -> dict[str, float]:
    """Return the seconds of a profiled call: own kernels, PyTorch's together, and waiting for the host."""
    own = {name.strip("_").removesuffix("_kernel"): time for name, time, _ in record.kernels if is_own(name)}
    busy = record.busy or 0.0
    return own | dict(zip(OTHERS, (busy - sum(own.values()), max(0.0, record.median - busy)), strict=True))


def is_own(kernel: str) -> bool:
    """Check whether a kernel's name in a profile is that of a Triton kernel of this package."""
    return re.fullmatch(r"\w+_kernel", kernel) is not None


def _against_classes(figure: Any, axes: Any, records: Sequence[Record], unit: str) -> None:
    ticks = sorted({record.classes or 0 for record in records})
    axes.set(xscale="log", yscale="log", xlabel="classes T", ylabel=unit)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    _plain_numbers(axes.yaxis)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)


def _plain_numbers(axis: Any, labelled: tuple[int, ...] = (1, 2, 5)) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, …, or at fewer places of a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=labelled, numticks=50))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(LogLocator(subs=range(1, 10), numticks=50))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _roofline(figure: Any, records: Sequence[Record]) -> None:
    """Draw a panel per type, each with its own roof."""
    from matplotlib.lines import Line2D

    records = [r for r in records if r.flop and r.least_bytes and r.matmul_rate and r.copy_bandwidth]
    types = [dtype for dtype in DTYPES if any(r.case.endswith(dtype) for r in records)]
    panels = figure.subplots(1, len(types), sharey=True, squeeze=False)[0]
    stages = [stage for stage in STAGES if any(_stage(r) == stage for r in records)]
    for axes, dtype in zip(panels, types, strict=True):
        own = [record for record in records if record.case.endswith(dtype)]
        places = [(r.flop or 0) / (r.least_bytes or 1) for r in own]
        top, slope = (own[0].matmul_rate or 0) / 1e9, (own[0].copy_bandwidth or 0) / 1e9
        ends = (min(*places, top / slope) / 2, 2 * max(*places, top / slope))
        axes.plot([ends[0], top / slope, ends[1]], [ends[0] * slope, top, top], color="black", linewidth=1)
        for place, record in zip(places, own, strict=True):
            colour = f"C{STAGES.index(_stage(record))}"
            marker = MARKERS[record.run]
            axes.scatter(place, (record.rate or 0) / 1e9, s=50, marker=marker, color=colour, zorder=3)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of inputs and outputs")
        axes.set_title(f"{dtype}: {top:,.0f} GFLOP/s, {slope:,.0f} GB/s", fontsize=10)
        _plain_numbers(axes.xaxis, labelled=(1,))
        _plain_numbers(axes.yaxis)
    panels[0].set_ylabel("GFLOP/s (line: matrix product and\ncopy, measured in the same run)")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=f"C{STAGES.index(stage)}", label=stage)
        for stage in stages
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color="gray", label=run)
        for run, marker in MARKERS.items()
        if any(record.run == run for record in records)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)


def _ablation(figure: Any, records: Sequence[Record]) -> None:
    """Draw a bar per step, with the time that the step saved behind it."""
    axes = figure.subplots()
    records = sorted(records, key=lambda record: STEPS.index(record.run))
    first, before = 1e3 * records[0].median, 1e3 * records[0].median
    for place, record in enumerate(records):
        after = 1e3 * record.median
        if after < before:
            axes.barh(place, before - after, left=after, color="C0", alpha=0.2)
        axes.barh(place, after, color="C0")
        low, high = _spread(record)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        label = f"{seconds(record.median)}, {first / after:.3g}x"
        axes.text(max(before, high), place, f"  {label}", va="center")
        before = after
    axes.set_yticks(range(len(records)), [record.run for record in records])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(_spread(record)[1] for record in records))  # room for the labels
    axes.set_xlabel("ms (median; line: p20 to p80), and how many times as fast as the reference")


def _spread(record: Record) -> tuple[float, float]:
    """Return the milliseconds at p20 and p80, or the median if they were not kept."""
    low, high = (record.median if value is None else value for value in (record.p20, record.p80))
    return 1e3 * low, 1e3 * high


def _by_run(records: Sequence[Record]) -> list[tuple[dict[str, Any], tuple[str, list[Record]]]]:
    """Yield the style of the line, the label and the records of each run, few classes first."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.run, record.classes or 0)):
        dtype = next((dtype for dtype in DTYPES if dtype in _parts(record)), "fp32")
        label = record.run if dtype in record.run else f"{record.run}, {dtype}"
        found.setdefault(label, []).append(record)
    return [
        ({"color": f"C{place}", "marker": LINE_MARKERS[place % len(LINE_MARKERS)]}, item)
        for place, item in enumerate(found.items())
    ]


def _case(records: Sequence[Record]) -> str:
    """Return the part that is common to the cases' names."""
    common = [part for part in _parts(records[0]) if all(part in _parts(record) for record in records)]
    return ", ".join(common)


def _parts(record: Record) -> Iterable[str]:
    return record.case.split(", ")


def _stage(record: Record) -> str:
    return record.case.split(", t=")[0]
