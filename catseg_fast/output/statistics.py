"""Statistics of many pictures in one file: a row for each picture and class that occurs in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from catseg_fast.console import printable
from catseg_fast.errors import InputError, MissingPackageError
from catseg_fast.files import open_regular, replacing

COLUMNS = {"image", "width", "height", "index", "class", "pixels", "share", "mean_score"}
GROUP = 50_000  # rows that are in memory at a time


def check_target(path: Path) -> None:
    """Check that statistics can be written to `path`.

    Raises:
        InputError: if it is neither a .parquet nor a .json file.
        FileExistsError: if a file is there that is not such statistics.
        ImportError: if pyarrow, which writes Parquet, is not installed.
    """
    if path.suffix not in (".parquet", ".json"):
        raise InputError(f"{path}: expected a .parquet or a .json file")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingPackageError(
                f"{path}: Parquet needs pyarrow: pip install 'catseg-fast[batch]'; a .json file needs nothing"
            ) from None
    if os.path.lexists(path) and not _is_statistics(path):
        raise FileExistsError(f"{path} exists and does not hold statistics; choose another file")


def _is_statistics(path: Path) -> bool:
    """Check whether a file is one that `write_statistics` has written, by its columns."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return set(pq.read_schema(path).names) == COLUMNS
        with open_regular(path) as file:
            start, row = file.readline(), file.readline(2**20).strip()
        return start == b"[\n" and (row == b"]" or json.loads(row.removesuffix(b",")).keys() == COLUMNS)
    except Exception:  # damaged files raise errors of many types
        return False


def write_statistics(path: Path, results: Iterable[Path]) -> int:
    """Write the statistics of `results`, the pictures' JSON files, atomically; return the number of rows.

    Columns: image, width, height, index, class, pixels, share (of the picture's pixels), mean_score.
    """
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_parquet if path.suffix == ".parquet" else _write_json
    with replacing(path) as temporary:
        return write(temporary, _rows(results))


def _rows(results: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for result in results:
        content = json.loads(result.read_text(encoding="utf-8"))
        picture = {name: content[name] for name in ("image", "width", "height")}
        for entry in content["classes"]:
            if entry["share"]:
                yield {
                    **picture,
                    "index": entry["index"],
                    "class": entry["name"],
                    "pixels": round(entry["share"] * content["width"] * content["height"]),
                    "share": entry["share"],
                    "mean_score": entry["mean_score"],
                }


def _write_json(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    # A file's name can hold bytes that are not UTF-8: lone surrogates, which JSON has escapes for.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("[")
        for count, row in enumerate(rows, 1):
            file.write(("\n " if count == 1 else ",\n ") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    return count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("image", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("index", pa.int32()),
            ("class", pa.string()), ("pixels", pa.int64()), ("share", pa.float64()),
            ("mean_score", pa.float64()),
        ]
    )  # fmt: skip
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group := [{**row, "image": printable(row["image"])} for row in islice(rows, GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count
