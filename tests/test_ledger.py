"""The ledger of an evaluation: one evaluation at a time, and damage that stays local."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

from catseg_fast.errors import RunError
from catseg_fast.evaluation.ledger import Ledger

ABOUT = {"weights": "ab", "classes": ["sky", "tree"], "size": 0.1}
RECORDS = [
    {
        "name": f"picture {index}",
        "seconds": 1 / (index + 3),
        "counts": [[0, index], [3, 4], [5, 10**12], [1, 0]],
    }
    for index in range(6)
]


def write(folder: Path, *ranks: int) -> list[Path]:
    """Write a file per rank, with the records shared among them."""
    for place, rank in enumerate(ranks):
        ledger = Ledger(folder, "run", ABOUT)
        ledger.open(rank)
        for record in RECORDS[place :: len(ranks)]:
            ledger.add(record)
        ledger.close()
    return [folder / f"run.{rank}.jsonl" for rank in ranks]


def read(folder: Path) -> dict[str, Any]:
    ledger = Ledger(folder, "run", ABOUT)
    try:
        return ledger.read()
    finally:
        ledger.close()


def expected(*left_out: int) -> dict[str, Any]:
    return {r["name"]: r for index, r in enumerate(RECORDS) if index not in left_out}


def test_what_is_added_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    write(tmp_path, 0, 1, 10)
    assert read(tmp_path) == expected()
    ledger = Ledger(tmp_path, "run", ABOUT)
    ledger.clear()
    assert ledger.read() == {}
    ledger.close()


DAMAGE = {
    "no JSON": lambda line: b"nonsense",
    "empty": lambda line: b"",
    "another type": lambda line: b"[1, 2]",
    "no name": lambda line: b'{"crc32": 2745614147}',
    "a digit": lambda line: line.replace(b"1000000000000", b"1000000000001"),
    "a letter": lambda line: line.replace(b"seconds", b"sekonds"),
    "no text": lambda line: line.replace(b"s", b"\xff", 1),
    "cut": lambda line: line[: len(line) // 2],
    "two in one": lambda line: line + line,
    "deep": lambda line: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_damaged_line_does_not_void_the_rest(damage: str, place: int, tmp_path: Path) -> None:
    (path,) = write(tmp_path, 0)
    lines = path.read_bytes().splitlines()
    lines[place + 1] = DAMAGE[damage](lines[place + 1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(RuntimeWarning, match=rf"run\.0\.jsonl: line {place + 2} is damaged, and its image"):
        assert read(tmp_path) == expected(place)
    ledger = Ledger(tmp_path, "run", ABOUT)
    with pytest.warns(RuntimeWarning):
        ledger.read()
    ledger.open()
    ledger.add(RECORDS[place])
    ledger.close()
    with pytest.warns(RuntimeWarning):
        assert read(tmp_path) == expected()


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("a digit", "a letter")])
def test_a_damaged_first_line_is_an_error(damage: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path, 0)
    first, *lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([DAMAGE[damage](first), *lines]) + b"\n")
    with pytest.raises(ValueError, match=r"run\.0\.jsonl is damaged, or not a file of an eval|of another"):
        read(tmp_path)


def test_no_bit_flip_goes_unnoticed(tmp_path: Path) -> None:
    """Each record is either as it was written, or left out with a warning."""
    (path,) = write(tmp_path, 0)
    valid, whole = path.read_bytes(), expected()
    for position in range(0, len(valid) * 8, 11):
        data = bytearray(valid)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = read(tmp_path)
            except ValueError:
                continue
        assert found.items() <= whole.items() if not found else all(whole[key] == found[key] for key in found)
        assert found == whole or caught or position // 8 >= valid.rstrip().rfind(b"\n"), position


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, 0)
    first, second = (Ledger(tmp_path, "run", ABOUT) for _ in range(2))
    first.read()
    first.open()
    for use in (second.read, second.clear):
        with pytest.raises(RunError, match="run is in use by another process"):
            use()
    assert Ledger(tmp_path, "another", ABOUT).read() == {}
    first.add(RECORDS[0])
    first.close()
    assert second.read() == expected()
    second.close()


def test_an_error_lets_others_go_on(tmp_path: Path) -> None:
    write(tmp_path, 0)
    with pytest.raises(ValueError, match="another evaluation"):
        Ledger(tmp_path, "run", {"weights": "c"}).read()
    assert read(tmp_path) == expected()


def test_a_killed_evaluation_lets_others_go_on(tmp_path: Path) -> None:
    def die() -> None:
        ledger = Ledger(tmp_path, "run", ABOUT)
        ledger.read()
        ledger.open()
        ledger.add(RECORDS[0])
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert read(tmp_path) == expected(1, 2, 3, 4, 5)
