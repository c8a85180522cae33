"""Checkpoint files that are made to do harm: each is refused, soon, with a message that can be printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from catseg_fast.checkpoints.checkpoint import read_checkpoint
from catseg_fast.checkpoints.stand_ins import FUNCTIONS
from support import hostile_files as hostile
from support.hostile_files import call, name, number, octets, row, text
from support.odd_checkpoints import PICKLE, STORED, entries, model, tensor
from support.refusals import SECONDS, assert_refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


# ---- fuzz -------------------------------------------------------------------------------------------------


PARTS = 8  # of all files; a part takes a minute or two


def fuzz(folder: Path, share: float, seed: int, part: int = 0, parts: int = 1) -> None:
    """Read hostile files in other processes, which must neither crash nor raise anything but a refusal."""
    pytest.importorskip("resource")
    arguments = map(str, (folder, share, seed, part, parts))
    command = [sys.executable, "-W", "ignore", "-m", "support.fuzz_checkpoints", *arguments]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    print(report)
    assert report["faults"] == []
    assert report["refused"] + report["read"] + report["equal"] == report["cases"] > 1000
    assert report["refused"] > report["cases"] / 2
    assert report["equal"] > 0
    assert report["longest"][0] < SECONDS


def test_a_share_of_all_hostile_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 0.004, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_hostile_files(part: int, tmp_path: Path) -> None:
    fuzz(tmp_path, 1, 1, part, PARTS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_fuzz_starts_from_calls_that_are_answered(function: str, path: Path) -> None:
    value = call(function, *hostile.ARGUMENTS.get(function, ()))
    path.write_bytes(model(hostile.TENSOR, keys=["kept"]))
    assert read_checkpoint(path)["kept"].shape == (4, 4)
    content = b"\x80\x02}" + hostile.MARK + text("model") + b"}" + text("used") + value + b"u."
    path.write_bytes(hostile.archive(content))
    assert read_checkpoint(path) == {}


# ---- objects that look like others ------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["O", "V8", "i4,O", "f4", "M8[ns]"])
def test_an_object_with_a_dtype_is_no_dtype(code: str, path: Path) -> None:
    liar = hostile.NEW_DICT + b"}" + text("dtype") + text(code) + b"s" + hostile.BUILD
    for size in (4, 8, 16, 32, 64):
        data = octets(bytes([65]) * size)
        assert_refused(
            path, model(call("numpy.core.multiarray.scalar", liar, data)), "arguments of numpy's scalar"
        )
        state = row(number(1), row(number(size // 8)), liar, hostile.FALSE, data)
        assert_refused(path, model(hostile.NEW_ARRAY + state + hostile.BUILD), "the type of a numpy array")


@pytest.mark.parametrize(
    "code", ["O", "O8", "V8", "S4", "U4", "M8", "m8", "c8", "f16", "f4,f4", "(2,)f4", "f\x1b4"]
)
def test_other_dtypes_are_refused(code: str, path: Path) -> None:
    assert_refused(path, model(hostile.dtype(code)), "numpy arrays of type .* are not supported")


@pytest.mark.parametrize("order", ["", "<<", "O", "<f4,", "s", "!"])
def test_other_byte_orders_are_refused(order: str, path: Path) -> None:
    assert_refused(path, model(hostile.dtype("f4", order)), "the byte order of a numpy type")


def array_of(data: bytes, *shape: int) -> bytes:
    state = row(number(1), row(*map(number, shape)), hostile.dtype(), hostile.FALSE, octets(data))
    return hostile.NEW_ARRAY + state + hostile.BUILD


STATES: dict[str, tuple[bytes, str]] = {
    "no array": (hostile.NEW_ARRAY, "a numpy array without its state"),
    "no dtype": (
        call("numpy.core.multiarray.scalar", hostile.new_dtype(), octets(bytes(4))),
        "a numpy type without its state",
    ),
    "two arrays": (hostile.ARRAY + row(*hostile.ARRAY_STATE) + hostile.BUILD, "which has two states"),
    "two dtypes": (hostile.dtype() + row(*hostile.DTYPE_STATE) + hostile.BUILD, "which has two states"),
    "fields": (
        hostile.new_dtype()
        + row(*hostile.DTYPE_STATE[:3], row(text("a")), *hostile.DTYPE_STATE[4:])
        + hostile.BUILD,
        "which has fields",
    ),
    "short": (array_of(bytes(12), 2, 2), "numpy array of 16 bytes has 12"),
    "long": (array_of(bytes(20), 2, 2), "numpy array of 16 bytes has 20"),
    "overflow": (array_of(bytes(16), 2**62 + 1, 4), "has 16"),
    "negative": (array_of(bytes(16), -1, -4), "the shape of a numpy array"),
    "a state for a tensor": (hostile.TENSOR + b"}" + hostile.BUILD, "restores the state of a Tensor"),
    "a state for a function": (name("numpy.dtype") + b"}" + hostile.BUILD, "restores the state of a Global"),
    "a function as a value": (name("numpy.dtype"), "'a' is a Global"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states_are_required_once_and_exact(case: str, path: Path) -> None:
    piece, reason = STATES[case]
    assert_refused(path, model(piece), reason)


# ---- tensors ----------------------------------------------------------------------------------------------

# Of a storage of 16 values: offset, size, stride.
OUTSIDE: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "too long": (0, (17,), (1,)),
    "offset": (13, (4,), (1,)),
    "offset far": (2**62, (1,), (1,)),
    "negative offset": (-1, (1,), (1,)),
    "negative size": (0, (-1,), (1,)),
    "negative stride": (15, (2,), (-1,)),
    "stride": (0, (2, 2), (15, 1)),
    "sizes that overflow": (0, (2**32, 2**32), (1, 1)),
    "strides that overflow": (0, (3,), (2**63 - 1,)),
    "more elements than values": (0, (2**40,), (0,)),
    "an empty giant": (0, (0, 2**62), (1, 1)),
    "too few strides": (0, (2, 2), (1,)),
    "too many sizes": (0, (1,) * 65, (1,) * 65),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_lies_inside_of_its_storage(case: str, path: Path) -> None:
    offset, size, stride = OUTSIDE[case]
    piece = tensor(hostile.storage(), number(offset), row(*map(number, size)), row(*map(number, stride)))
    assert_refused(path, model(piece), "needs .* elements of a storage of 16|the (offset|size) of a tensor")


STORAGE_IDS: dict[str, tuple[int, bytes, str]] = {
    "longer": (0, number(17), "storage 0 has 64 bytes, but should have 17 elements of 4"),
    "shorter": (0, number(15), "storage 0 has 64 bytes, but should have 15 elements of 4"),
    "of another type": (1, name("torch.DoubleStorage"), "should have 16 elements of 8"),
    "not there": (2, text("9"), "there is no storage 9"),
    "elsewhere": (2, text("../w/data/0"), "there is no storage"),
    "a number": (2, number(0), "the persistent id of a storage"),
    "no storage": (0, text("module"), "the persistent id of a storage"),
    "no type": (1, name("torch.float32"), "the persistent id of a storage"),
    "negative": (4, number(-16), "the persistent id of a storage"),
}


@pytest.mark.parametrize("case", STORAGE_IDS)
def test_a_storage_is_as_long_as_it_says(case: str, path: Path) -> None:
    place, value, reason = STORAGE_IDS[case]
    identity = list(hostile.STORAGE_ID)
    identity[4 if case in ("longer", "shorter") else place] = value
    piece = tensor(hostile.storage(*identity), number(0), row(number(1)), row(number(1)))
    assert_refused(path, model(piece), reason)


@pytest.mark.parametrize("write", [hostile.archive, hostile.legacy])
def test_a_storage_has_one_type(write: Callable[[bytes], bytes], path: Path) -> None:
    """torch would read both tensors in the type of the first."""
    legacy = (hostile.NONE,) if write is hostile.legacy else ()
    identities = [
        (hostile.STORAGE_ID[0], name(kind), *hostile.STORAGE_ID[2:], *legacy)
        for kind in ("torch.FloatStorage", "torch.IntStorage")
    ]
    pieces = [tensor(hostile.storage(*x), number(0), row(number(1)), row(number(1))) for x in identities]
    assert_refused(path, write(hostile.in_model(row(*pieces))), "storage 0 has two types")


def test_a_legacy_file_gets_no_memory_that_it_does_not_fill(path: Path) -> None:
    for elements in (2**40, 17, 15):
        identity = (*hostile.STORAGE_ID[:4], number(elements), hostile.NONE)
        piece = tensor(hostile.storage(*identity), number(0), row(number(1)), row(number(1)))
        assert_refused(
            path, hostile.legacy(hostile.in_model(piece)), "more than the .* bytes of the file|storage 0 is"
        )


def test_many_tensors_on_one_storage(path: Path) -> None:
    for count in (1, 3, 2000):
        pairs = b"".join(text(f"k{index}") + b"h\x00" for index in range(count))
        first = text("first") + hostile.TENSOR + b"q\x00s"
        data = hostile.archive(b"\x80\x02}" + first + hostile.MARK + pairs + b"u.")
        if count < 2000:  # as tied weights are
            path.write_bytes(data)
            assert len(read_checkpoint(path)) == count + 1
        else:
            assert_refused(path, data, f"its tensors have {64 * (count + 1)} bytes, the file {len(data)}")


def test_metadata_that_changes_values_is_refused(path: Path) -> None:
    marks = b"}" + text("neg") + hostile.TRUE + b"s"
    arguments = (*hostile.TENSOR_ARGUMENTS, marks)
    assert_refused(
        path, model(call("torch._utils._rebuild_tensor_v2", *arguments)), "the metadata of a tensor"
    )


def test_booleans_are_0_or_1(path: Path) -> None:
    identity = (hostile.STORAGE_ID[0], name("torch.BoolStorage"), *hostile.STORAGE_ID[2:4], number(64))
    path.write_bytes(model(tensor(hostile.storage(*identity), number(0), row(number(64)), row(number(1)))))
    found = read_checkpoint(path)["a"]
    assert found.dtype == torch.bool
    assert found.view(torch.uint8).tolist() == [0] + [1] * 63


def test_a_storage_at_an_odd_place_is_read(path: Path) -> None:
    expected = torch.frombuffer(bytearray(hostile.RAW), dtype=torch.float32).view(4, 4)
    for padding in range(9):
        path.write_bytes(entries(PICKLE, ("w/padding", bytes(padding)), STORED))
        found = read_checkpoint(path)["x"]
        assert found.data_ptr() % 4 == 0
        assert torch.equal(found, expected)
