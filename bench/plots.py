"""The plots of the report; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.records import Record
from bench.tables import seconds


def draw_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there are records for, as PNG files.

    Raises:
        ModuleNotFoundError: without matplotlib (`pip install -e ".[bench]"`).
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[str, Callable[[Any, Sequence[Record]], None]]] = {
        "time": ("scaling", _time),
        "memory": ("scaling", _memory),
        "roofline": ("kernels", _roofline),
        "ablation": ("ablation", _ablation),
    }
    drawn = []
    for name, (group, draw) in plots.items():
        for number, device in enumerate(dict.fromkeys(r.device for r in records if r.group == group)):
            path = folder / (f"{name}-{number + 1}.png" if number else f"{name}.png")
            own = [r for r in records if r.group == group and r.device == device]
            _save(path, device, own, draw)
            drawn.append(path)
    return drawn


def _save(
    path: Path, device: str, records: Sequence[Record], draw: Callable[[Any, Sequence[Record]], None]
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw(axes, records)
    axes.grid(alpha=0.3)
    figure.text(0.99, 0.005, device, ha="right", va="bottom", fontsize=7, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _time(axes: Any, records: Sequence[Record]) -> None:
    _against_classes(axes, records, lambda record: 1e3 * record.median)
    for run, own in _by_run(records).items():
        axes.fill_between(
            [r.classes for r in own],
            [1e3 * r.p20 for r in own],
            [1e3 * r.p80 for r in own],
            alpha=0.2,
            label=f"_{run}",
        )
    axes.set(ylabel="milliseconds (median; p20 to p80 shaded)", title=f"Aggregator: time\n{_case(records)}")


def _memory(axes: Any, records: Sequence[Record]) -> None:
    measured = [record for record in records if record.peak_bytes is not None]
    _against_classes(axes, measured, lambda record: (record.peak_bytes or 0) / 2**20)
    axes.set(ylabel="MiB above weights and inputs", title=f"Aggregator: peak memory\n{_case(records)}")


def _against_classes(axes: Any, records: Sequence[Record], value: Callable[[Record], float]) -> None:
    for run, own in _by_run(records).items():
        axes.plot([r.classes for r in own], [value(r) for r in own], marker="o", label=run)
    ticks = sorted({record.classes or 0 for record in records})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("classes T")
    axes.legend()


def _roofline(axes: Any, records: Sequence[Record]) -> None:
    """Kernels by their operations a byte, in shares of the matmul rate of their own type."""
    for kind, marker in (("torch", "o"), ("Triton", "^")):
        for dtype, colour in (("fp32", "C0"), ("bf16", "C1"), ("fp16", "C2")):
            own = [
                r for r in records if r.run == kind and r.case.endswith(dtype) and r.flop and r.least_bytes
            ]
            if not own:
                continue
            ridge = own[0].matmul_rate / own[0].copy_bandwidth
            x = [(r.flop or 0) / (r.least_bytes or 1) for r in own]
            axes.scatter(
                x, [r.matmul_share for r in own], marker=marker, color=colour, label=f"{kind}, {dtype}"
            )
            for place, record in zip(x, own, strict=True):
                axes.annotate(
                    record.case.split(", t=")[0], (place, record.matmul_share or 0), fontsize=6,
                    xytext=(4, 3), textcoords="offset points",
                )  # fmt: skip
            axes.plot([1, ridge, 1e4], [1 / ridge, 1, 1], color=colour, alpha=0.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(
        xlabel="operations a byte of inputs and outputs",
        ylabel="share of the measured matmul rate",
        title="Roofline: copy bandwidth and matmul rate as measured in the same run",
    )
    axes.legend()


def _ablation(axes: Any, records: Sequence[Record]) -> None:
    """A bar a step, in the order of measuring; what a step saved is behind its bar."""
    before: float | None = None
    for place, record in enumerate(records):
        milliseconds = 1e3 * record.median
        if before is not None:
            axes.barh(place, before - milliseconds, left=milliseconds, color="C0", alpha=0.25)
        axes.barh(place, milliseconds, color="C0")
        axes.text(milliseconds, place, f" {seconds(record.median)}", va="center", fontsize=8)
        before = milliseconds
    axes.set_yticks(range(len(records)), [record.run for record in records])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15e3 * max(record.median for record in records))  # room for the numbers
    axes.set(xlabel="milliseconds", title=f"What each step saves\n{_case(records)}")


def _by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records with a number of classes, by what ran, few classes first."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.classes or 0):
        if record.classes is not None:
            found.setdefault(record.run, []).append(record)
    return found


def _case(records: Sequence[Record]) -> str:
    """What the cases have in common."""
    first = records[0].case.split(", ")
    return ", ".join(part for part in first if all(part in record.case.split(", ") for record in records))
