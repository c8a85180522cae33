"""Records as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import Change, Record


def cells(record: Record) -> dict[str, str]:
    """Return a record by column; what was not measured is left empty."""
    return {
        "case": record.case,
        "run": record.run + (f" [{record.note}]" if record.note else ""),
        "median": seconds(record.median),
        "p20, p80": percentiles(record),
        "ms a class": _number(
            None if record.classes is None else 1e3 * record.median / record.classes, "{:.3g}"
        ),
        "peak MiB": _number(record.peak_bytes, "{:.4g}", 2**20),
        "reference GFLOP": _number(record.reference_flop, "{:.3g}", 1e9),
        "GFLOP": _number(record.flop, "{:.3g}", 1e9),
        "TFLOP/s": _number(record.rate, "{:.3g}", 1e12),
        "of matmul": _number(record.matmul_share, "{:.0%}"),
        "of copy": _number(record.copy_share, "{:.1%}"),
        "error": _number(record.error_ratio, "{:.2f}x"),
    }


def seconds(value: float) -> str:
    """Return seconds in the unit that fits."""
    unit, name = next((item for item in ((1.0, "s"), (1e-3, "ms")) if value >= item[0]), (1e-6, "us"))
    return f"{three_digits(value / unit)} {name}"


def three_digits(value: float) -> str:
    """Return a number below 1000 with three significant digits: 83.0 and 111."""
    return f"{value:#.3g}".rstrip(".")


def percentiles(record: Record) -> str:
    """Return p20 and p80; empty if they were not kept."""
    return ", ".join(seconds(value) for value in (record.p20, record.p80) if value is not None)


def summary(records: Sequence[Record]) -> str:
    """Return the devices, then one table in Markdown, with speed-ups over baseline (a)."""
    baseline = {
        (record.device, record.group, _apart_from_type(record)): record.median
        for record in records
        if record.run.startswith("(a)")
    }
    rows = []
    for record in sorted(records, key=lambda record: record.group):  # otherwise in the order of measurement
        of_reference = baseline.get((record.device, record.group, _apart_from_type(record)))
        row = {"group": record.group, **cells(record)}
        row["against (a)"] = _number(of_reference and of_reference / record.median, "{:.2f}x")
        rows.append(row)
    return "\n".join([*_conditions(records), "", markdown(rows)])


def changes(found: Sequence[Change]) -> str:
    """Return a comparison in Markdown, with both spreads."""
    rows = [
        {
            "benchmark": change.new.id.rpartition("::")[2],
            "old median (p20, p80)": _spread(change.old),
            "new median (p20, p80)": _spread(change.new),
            "change": f"{change.relative:+.1%}",
            "": "SLOWER" if change.slower else "",
        }
        for change in found
    ]
    return markdown(rows)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return a table in Markdown, with the columns of its first row."""
    columns = list(rows[0])
    lines = [list(row.values()) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, ["---"] * len(columns), *lines))


def what_ran(records: Sequence[Record]) -> str:
    """Return the device of records, and the versions and commits of what ran on it."""
    ran: dict[str, dict[str, None]] = {}  # commits by versions, each once and in order
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        ran.setdefault(versions, {})[record.commit] = None
    parts = (f"{versions}, {' and '.join(commits)}" for versions, commits in ran.items())
    return f"{records[0].device}: {'; '.join(parts)}"


def _conditions(records: Sequence[Record]) -> list[str]:
    """Return each device, with what ran on it and its own best rates."""
    lines = []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device]
        rates = sorted({record.matmul_rate / 1e12 for record in own if record.matmul_rate})
        copies = sorted({record.copy_bandwidth / 1e9 for record in own if record.copy_bandwidth})
        lines.append(
            f"- {what_ran(own)}; matrix product {_range(rates)} TFLOP/s over all types, "
            f"copy {_range(copies)} GB/s"
        )
    return lines


def _range(values: Sequence[float]) -> str:
    if not values:
        return "of unknown"
    low, high = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return low if low == high else f"{low} to {high}"


def _spread(record: Record) -> str:
    spread = percentiles(record)
    return f"{seconds(record.median)} ({spread})" if spread else seconds(record.median)


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _apart_from_type(record: Record) -> str:
    """Return the case without its type, which is not that of the reference in fp32."""
    return ", ".join(part for part in record.case.split(", ") if part not in ("fp16", "bf16", "fp32"))
