"""Class names as users write them: files, separators, sets, templates, and classes with the same prompts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from catseg_fast.cli.main import app
from catseg_fast.cli.options import class_names
from catseg_fast.config import Version
from catseg_fast.errors import InputError, InputTypeError
from catseg_fast.text.class_lists import READY_LISTS, read_classes, ready_list, separator_notes
from catseg_fast.text.fold import Fold
from catseg_fast.text.prompts import check_classes, class_prompts, get_templates
from catseg_fast.text.same_prompts import same_prompts, warn_of_same_prompts
from catseg_fast.text.tokens import tokenize_classes
from support.tiny import tiny_model

VERSIONS: tuple[Version, ...] = ("v1", "v2")
UTF_16 = {"utf-16": "UTF-16", "utf-16-be": "UTF-16", "utf-16-le": "UTF-16", "utf-32": "UTF-32"}


# ---- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("# of a street\nsky\ntree # oak\n\n  # more\nroad", ["sky", "tree", "road"]),
        ("#1\nC# manual\nsky\t# blue", ["C# manual", "sky"]),
        (
            "tree\x0btop\nsky\x85blue\n\u2028sea\r\nroad\rcar",
            ["tree\x0btop", "sky\x85blue", "sea", "road", "car"],
        ),
    ],
)
def test_lines_and_comments(text: str, names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode())
    assert read_classes(path) == names


def test_a_file_of_comments_has_no_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# sky\n  # tree\n")
    with pytest.raises(InputError, match="has no class names"):
        read_classes(path)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"0": "wall", "1": "sky"}, ["wall", "sky"]),
        ({str(index): f"c{index}" for index in reversed(range(12))}, [f"c{index}" for index in range(12)]),
        ({"model_type": "segformer", "id2label": {"1": "b", "0": "a"}, "label2id": {"a": 0}}, ["a", "b"]),
        (
            {"sky": ["sky"], "background": ["wall", "floor"]},
            {"sky": ["sky"], "background": ["wall", "floor"]},
        ),
        ({"0": ["wall"], "1": ["sky", "air"]}, {"0": ["wall"], "1": ["sky", "air"]}),
    ],
)
def test_objects(content: object, names: object, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    assert read_classes(path) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": "wall", "2": "sky"}', r"the keys 0\.\.1 for 2 names, .* found the key '2'"),
        ('{"0": "wall", "02": "sky"}', "found the key '02'"),
        ('{"0": "wall", "0": "sky"}', "the key '0' is listed twice"),
        ('{"a": ["b"], "a": ["c"]}', "the key 'a' is listed twice"),
        ("{}", "the list is empty"),
    ],
)
def test_bad_objects(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)


MANY = 40_000
NUMBERS = range(MANY)


def with_a_second(key: str, content: dict[str, str]) -> str:
    """The JSON of an object that has another entry of a key at its end."""
    return f'{json.dumps(content)[:-1]}, "{key}": "y"}}'


LONG: dict[str, tuple[Callable[[], str], str]] = {
    "second key": (lambda: with_a_second(f"n{MANY - 1}", {f"n{i}": "x" for i in NUMBERS}), "listed twice"),
    "odd key": (lambda: with_a_second("99999", {str(i): "x" for i in NUMBERS}), "found the key '99999'"),
    "of two": (
        lambda: json.dumps({f"n{i}": [f"m{i}"] for i in NUMBERS} | {"n": ["m1"]}),
        "'m1' is a name of",
    ),
    "not names": (lambda: json.dumps({"a" * 10**6: list(NUMBERS)}), "expected its name"),
    "nested": (lambda: "[" * 10**5 + "]" * 10**5, "is not JSON"),
    "nested objects": (lambda: '{"a":' * 10**5 + "1" + "}" * 10**5, "is not JSON"),
    "a long number": (lambda: f"[{'9' * 10**5}]", "is not JSON"),
    "an infinite number": (lambda: '{"a": 1e400}', "has inf; expected"),
}


@pytest.mark.parametrize("case", LONG)
def test_long_files_are_refused_soon(case: str, tmp_path: Path) -> None:
    """In a time that does not grow with the square of their length, and in few words."""
    make, message = LONG[case]
    path = tmp_path / "classes.json"
    path.write_text(make())
    start = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        read_classes(path)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 2000


def test_folds_of_many_names() -> None:
    start = time.process_time()
    fold = Fold.of({f"class {index}": [f"a{index}", f"b{index}"] for index in range(MANY)})
    assert fold.by_class["class 7"] == ["a7", "b7"]
    assert len(fold.by_class) == MANY
    assert time.process_time() - start < 5


@pytest.mark.parametrize("suffix", ["txt", "json"])
@pytest.mark.parametrize("encoding", UTF_16)
def test_other_unicode_is_told(encoding: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"classes.{suffix}"
    path.write_bytes('["sky", "tree"]'.encode(encoding))
    with pytest.raises(InputError, match=f"is {UTF_16[encoding]}.*, not UTF-8: save it as UTF-8"):
        read_classes(path)


# ---- separators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("sky; tree", []),
        ("sky", []),
        ("person, man; sky", []),
        ("sky, tree", ["this is one class with 2 synonyms; semicolons separate classes"]),
        ("water,grass,pink moon", ["this is one class; semicolons separate classes"]),
        ("sky\uff1btree", ["is one class with a full-width semicolon in its name; semicolons separate"]),
        ("sky; tree\uff1broad", ["'tree\uff1broad' is one class with a full-width semicolon"]),
        ("天空、树", ["an ideographic comma"]),
        ("sky|tree|road", ["a vertical bar"]),
        ("ade-150; sky", ["'ade-150' is a class of that name here"]),
    ],
)
def test_notes_of_a_line(text: str, notes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = class_names(text, None, None, None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(notes) == len(separator_notes(names))
    for line, expected in zip(said, notes, strict=True):
        assert line.startswith("note: ")
        assert expected in line


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (
            "a.txt",
            "water,grass,striped pink moon\n",
            "this is one class; lines (.txt) or strings (.json) separate",
        ),
        ("a.json", '["water, grass"]', "this is one class with 2 synonyms"),
        ("a.txt", "sky; tree\nroad\n", "'sky; tree' is one class with a semicolon in its name; lines"),
        ("a.txt", "sky\nroad\n", None),
    ],
)
def test_notes_of_a_file(
    name: str, content: str, note: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    class_names(None, tmp_path / name, None, None)
    said = capsys.readouterr().err
    assert said == "" if note is None else note in said


@pytest.mark.parametrize("name", READY_LISTS)
def test_ready_lists_are_good(name: str) -> None:
    names = ready_list(name).classes
    check_classes(list(names))
    assert separator_notes(names) == separator_notes(names, file=True) == []


@pytest.mark.parametrize("text", ["person, ; tree", "tree; ,person", "a,,b", "a, ,b", "tree,"])
def test_a_trailing_comma_is_a_blank_synonym(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has a blank synonym"):
        check_classes(class_names(text, None, None, None))
    (tmp_path / "a.png").write_bytes(b"")
    result = CliRunner().invoke(app, ["segment", str(tmp_path / "a.png"), "--classes", text])
    assert result.exit_code == 1
    assert "has a blank synonym" in result.stderr


# ---- not a list of names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"sky", "tree"}, "got a set, whose order changes from run to run"),
        (frozenset({"sky"}), "got a frozenset"),
        (7, "expected a list of names, got 7"),
        (None, "expected a list of names, got None"),
        (b"sky", "expected a list of names, got b'sky'"),
    ],
)
def test_no_list_of_names(classes: Any, message: str) -> None:
    with pytest.raises(InputTypeError, match=f"classes: .*{message}"):
        check_classes(classes)


def test_a_model_refuses_a_set() -> None:
    model = tiny_model(classes=["sky", "tree"])
    for use in (lambda: tiny_model(classes={"a", "b"}), lambda: model.set_classes({"a", "b"})):  # type: ignore[arg-type]
        with pytest.raises(InputTypeError, match="got a set"):
            use()
    assert model.classes == ("sky", "tree")


def test_what_has_an_order_is_taken() -> None:
    for classes in ({"b": 1, "a": 2}.keys(), (name for name in "ba"), dict.fromkeys("ba"), ("b", "a")):
        if isinstance(classes, dict):
            with pytest.raises(InputTypeError, match="got a dict"):
                check_classes(classes)  # type: ignore[arg-type]
        else:
            assert check_classes(classes) == ("b", "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sk\udcffy", "\ud800", "sky \udfff"])
def test_names_of_broken_unicode(name: str) -> None:
    with pytest.raises(InputError, match=r"entry 1, .* is not valid Unicode"):
        check_classes(["tree", name])


@pytest.mark.parametrize("unit", ["qzjx", "天", "& ", "é1", "very "])
def test_a_name_of_any_length_is_refused_at_once(unit: str) -> None:
    """The tokenizer's time is quadratic in a word's length; the message does not repeat the whole name."""
    letters = random.Random(0)
    name = "".join(letters.choice(unit + "abcdefghij") + unit for _ in range(100_000))
    begin = time.process_time()
    with pytest.raises(InputError, match="more than CLIP's 77") as caught:
        tokenize_classes(["sky", name], ["a photo of a {}."], "v2")
    assert time.process_time() - begin < 2
    assert len(str(caught.value)) < 3000
    assert f"({len(name)} characters)" in str(caught.value)
    with pytest.raises(InputError, match="is listed twice") as caught:
        check_classes([name, name])
    assert len(str(caught.value)) < 1000


# ---- templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    ["a {} in {place}", "a {0}", "{name}", "a {:>9}", "a {!r}", "a {", "} {}", "{{}}", "a {}{}[{x}]"],
)
def test_templates_with_other_braces(template: str) -> None:
    with pytest.raises(InputError, match=r"prompt_ensemble: the template .* has "):
        get_templates(["a photo of {}", template])


def test_braces_that_stand_for_themselves() -> None:
    templates = get_templates(["{{a}} {}", "{} and {}", "{}"])
    assert class_prompts("{x}", templates, "v2") == ["{a} {x}", "{x} and {x}", "{x}"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [([5], "entry 0 is 5, not a string"), ({"a {}"}, "got a set"), ({"a {}": 1}, "got a dict"), (3, "got 3")],
)
def test_what_is_no_list_of_templates(templates: Any, message: str) -> None:
    with pytest.raises(InputTypeError, match=f"prompt_ensemble: .*{message}"):
        get_templates(templates)


# ---- classes with the same prompts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "v1", "v2"),
    [
        (["Sky", "tree", "sky"], [[0, 2]], [[0, 2]]),
        (["café", "cafe\u0301"], [[0, 1]], [[0, 1]]),
        (["  tree", "tree ", "tr ee"], [[0, 1]], [[0, 1]]),
        (["bag, handbag", "bag, suitcase"], [], [[0, 1]]),
        (["a, b", "b, a", "B,  a"], [[0, 1, 2]], [[1, 2]]),
        (["sky, sky", "sky", "a, a, b", "a, b"], [[0, 1]], [[0, 1], [2, 3]]),
        (["tom &amp; jerry", "tom & jerry"], [[0, 1]], [[0, 1]]),
        (["sky", "skies", "the sky"], [], []),
    ],
)
def test_same_prompts(names: list[str], v1: list[list[int]], v2: list[list[int]]) -> None:
    assert same_prompts(names, ["a photo of a {}."], "v1") == v1
    assert same_prompts(names, ["a photo of a {}."], "v2") == v2


@pytest.mark.parametrize(
    ("name", "version", "count"), [("ade-847", "v2", 10), ("ade-847", "v1", 0), ("ade-150", "v2", 0)]
)
def test_same_prompts_of_ready_lists(name: str, version: Version, count: int) -> None:
    names = list(ready_list(name).classes)
    groups = same_prompts(names, ["{}"], version)
    assert sum(len(group) - 1 for group in groups) == count
    if count:
        assert ["bag", "bag", "bag"] in [[names[index].split(",")[0] for index in group] for group in groups]


def test_the_pairs_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"1 class is never labelled.*'sky' \(2\) as 'Sky' \(0\)") as caught:
        model = tiny_model(classes=["Sky", "tree", "sky"])
    assert len(caught) == 1
    assert caught[0].filename == str(Path(tiny_model.__code__.co_filename))  # what called the package
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_classes(["Sky", "tree", "skies"])


def test_a_warning_of_many_pairs_has_an_end() -> None:
    with pytest.warns(UserWarning, match="99 classes are never labelled.*, and 79 more$"):
        warn_of_same_prompts(["x" + " " * count for count in range(100)], ["{}"], "v1", 77)


def test_order_and_answer_do_not_change_from_run_to_run() -> None:
    code = "from catseg_fast.text.prompts import check_classes; print(check_classes({'sky', 'tree', 'road'}))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed},
            check=False,
        )
        for seed in ("1", "2")
    ]
    assert all(run.returncode == 1 and "InputTypeError" in run.stderr for run in runs)
