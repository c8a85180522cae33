"""Results of evaluations as tables and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from catseg_fast.environment import describe_environment
from catseg_fast.evaluation.run import Evaluation
from catseg_fast.files import read_text, replacing

FP16_LARGEST = 65504.0


def check_target(path: Path) -> None:
    """Check that a file is missing, or holds the results of an evaluation.

    Raises:
        FileExistsError: if it is anything else.
    """
    if not os.path.lexists(path):
        return
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        content = None
    if not (isinstance(content, dict) and {"data_sha256", "results"} <= content.keys()):
        raise FileExistsError(f"{path} exists and is not of an evaluation; choose another folder")


def write_results(
    path: Path,
    about: Mapping[str, Any],
    classes: Sequence[str],
    rows: Sequence[tuple[Mapping[str, Any], Evaluation]],
) -> None:
    """Write all results as JSON, with the environment; NaN (no pixel of a class) becomes null.

    Args:
        path: the file.
        about: facts about all rows.
        classes: the class names.
        rows: facts about each evaluation, and the evaluation.

    Raises:
        OSError: if writing fails; an existing file is left unchanged.
    """
    keys = ("name", "iou", "accuracy", "intersection", "truth", "predicted")
    results = []
    for own, found in rows:
        counts = found.counts
        columns = (counts.iou, counts.accuracy, counts.intersection, counts.truth, counts.predicted)
        values = zip(classes, *(column.tolist() for column in columns), strict=True)
        results.append({
            **own, "images": found.images, **counts.scores(), "label_agreement": found.agreement,
            "unlabelled": found.unlabelled, "seconds_median": found.seconds, "activations": found.activations,
            "classes": [dict(zip(keys, row, strict=True)) for row in values],
        })  # fmt: skip
    content = _finite({**about, "environment": describe_environment(), "results": results})
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        # A path can hold bytes that are not UTF-8: lone surrogates, which JSON has escapes for.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_table(rows: Sequence[tuple[str, Evaluation]]) -> Table:
    """Return a table with one row per evaluation; the others are compared with the first."""
    table = Table(
        "", "mIoU", "mIoU, all met", "fwIoU", "pACC", "mACC", "same labels", "mIoU - first", "s/image"
    )
    unlabelled = any(found.unlabelled for _, found in rows)
    if unlabelled:
        table.add_column("unlabelled")
    reference = rows[0][1].counts.scores()["mIoU"]
    for name, found in rows:
        scores = found.counts.scores()
        same = "-" if found.agreement is None else f"{found.agreement:.4%}"
        change = "-" if found is rows[0][1] else f"{scores['mIoU'] - reference:+.5f}"
        cells = [f"{value:.4f}" for value in scores.values()]
        cells += [same, change, f"{found.seconds:.3f}"] + [f"{found.unlabelled:.4%}"] * unlabelled
        table.add_row(name, *cells)
    return table


def activations_table(name: str, activations: dict[str, float]) -> Table:
    """Return a table of the largest value in each stage, and of fp16's largest relative to it."""
    table = Table("stage", "largest value", "fp16 holds", title=f"{name}: values within the stages")
    for stage, value in activations.items():
        table.add_row(stage, f"{value:.4g}", f"{FP16_LARGEST / value:.0f} times that" if value else "-")
    return table


def classes_table(classes: Sequence[str], found: Evaluation, count: int) -> Table:
    """Return a table of the classes in the truth with the lowest and the highest IoU."""
    iou, truth = found.counts.iou.tolist(), found.counts.truth.tolist()
    order = sorted((index for index, pixels in enumerate(truth) if pixels), key=lambda index: iou[index])
    shown = order if len(order) <= 2 * count else [*order[:count], *order[-count:]]
    table = Table("class", "IoU", "pixels")
    for index in shown:
        table.add_row(classes[index], f"{iou[index]:.4f}", f"{truth[index]}")
    return table
