"""Every figure in README.md and BENCHMARKS.md comes from a file in bench/results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from bench import documents, predictions
from bench.documents import BLOCK, RESULTS, ROOT, TABLES, Results, busy_share, fill
from bench.raw_runs import DEFAULT_CONFIGS, ENGINE, GRAPH, MODEL, REFERENCE, WAYS
from bench.records import Record
from bench.tables import seconds, three_digits

RESULT = Results()
UNITS = r"(?:TFLOP/s|TB/s|GB/s|GiB|MiB|MB|ms|us|s|x|%)"
FIGURE = re.compile(rf"(?<![\w.=#])(\d[\d,.]*\d|\d)( ?{UNITS})(?![\w/])")

pytestmark = pytest.mark.xdist_group("operations")  # which are counted once per process


def gpu(run: str, T: int, dtype: str = ", fp16") -> Record:
    return RESULT.find(run, f"v2-vitl, T={T}, B=5{dtype}")


def ratio(a: float | None, b: float | None) -> str:
    assert a
    assert b
    return f"{a / b:.1f}x"


def raw(name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((RESULTS / "h200" / f"{name}.json").read_text())
    return content


def step_of_51() -> Record:
    (found,) = (r for r in RESULT.gpu if r.group == "steps" and r.classes == 51 and r.run == ENGINE)
    return found


def per_class() -> float:
    graph = [gpu(f"{ENGINE}, {GRAPH}", T).median for T in (150, 1203)]
    return (graph[1] - graph[0]) / (1203 - 150)


def bound(classes: str) -> float:
    content = json.loads((RESULTS / "predicted.json").read_text())["milliseconds"]
    return float(content["v2, all classes"][f"H200, {classes}"].split(" / ")[1]) / 1e3


@cache
def measured(name: str) -> Record:
    """Return a record; the records are read by the first test, not when tests are collected."""
    return {
        "reference": lambda: gpu(REFERENCE, 150, ""),
        "compiled": lambda: gpu(WAYS["compiled"], 150, ", bf16"),
        "plain": lambda: gpu(ENGINE, 150),
        "graph": lambda: gpu(f"{ENGINE}, {GRAPH}", 150),
        "large reference": lambda: gpu(REFERENCE, 1203, ""),
        "large": lambda: gpu(ENGINE, 1203),
        "large graph": lambda: gpu(f"{ENGINE}, {GRAPH}", 1203),
        "best": lambda: RESULT.find(ENGINE, "v2-vitl, T=847, B=5, fp16, best 256"),
        "best reference": lambda: RESULT.find(REFERENCE, "v2-vitl, T=847, B=5, best 256"),
        "model": lambda: RESULT.find("engine", MODEL),
    }[name]()


def median(name: str) -> float:
    return measured(name).median


def peak(name: str) -> int:
    bytes_ = measured(name).peak_bytes
    assert bytes_
    return bytes_


def share(name: str) -> str:
    return f"{busy_share(RESULT, measured(name)):.0%}"


# Figures in the text that are not in a table, and their values in the results.
CLAIMS: dict[str, Callable[[], str]] = {
    "10.3x as fast as upstream's way at T=150": lambda: ratio(median("reference"), median("graph")),
    "9.4x at T=1203": lambda: ratio(median("large reference"), median("large graph")),
    "1/35 of the memory": lambda: f"1/{peak('large reference') / peak('large'):.0f}",
    "gains only 1.2x": lambda: ratio(median("best reference"), median("best")),
    "30.6 s to compile": lambda: f"{compile_seconds()} s",
    "748 TFLOP/s": lambda: f"{ceiling('matmul_torch.float16')} TFLOP/s",
    "780 TFLOP/s": lambda: f"{ceiling('matmul_torch.bfloat16')} TFLOP/s",
    "4.28 TB/s": lambda: f"{ceiling('copy_TB/s')} TB/s",
    "10.9 ms of its 22.1 ms": lambda: (
        f"{seconds(measured('plain').busy or 0)} of its {seconds(median('plain'))}"
    ),
    "17.5 ms of 69.2 ms": lambda: f"{seconds(measured('model').busy or 0)} of {seconds(median('model'))}",
    "95.4 ms and 111 ms": lambda: f"{seconds(median('large'))} and {seconds(step_of_51().median)}",
    "20% at T=150 and 21% at T=1203": lambda: f"{share('plain')} at T=150 and {share('large')} at T=1203",
    "3.5x the [bound]": lambda: ratio(median("graph"), bound("T=150")),
    "137 ms against 167 ms": lambda: f"{seconds(median('best'))} against {seconds(median('best reference'))}",
    "28.1 ms of it": lambda: seconds(measured("best").busy or 0),
    "24.3 ms at T=150": lambda: seconds(median("compiled")),
    "2.7x our memory": lambda: ratio(peak("compiled"), peak("plain")),
    "20% and 58.7 ms were measured": lambda: (
        f"{share('plain')} and {seconds(gpu(f'{ENGINE}, {GRAPH}', 847).median)}"
    ),
    "of 38 tests of kernels at full size 37 passed": lambda: kernel_tests(),
    "10.8 ms, 58.7 ms and 83.0 ms at": lambda: graphs(),
    "72.1 ms in steps of 256": lambda: seconds(graph_in_steps_of_256().median),
    "12.8 ms in a graph": lambda: seconds(predicted_model()),
    "790 TFLOP/s and 4.3 TB/s for an H200": lambda: assumed("H200"),
    "312 TFLOP/s and 2.0 TB/s for an A100": lambda: assumed("A100"),
    "3.4x that time per class": lambda: ratio(per_class(), (bound("T=1000") - bound("T=150")) / 850),
}
NOT_MEASURED = {  # an aim, the noise that was observed on this machine, and a computed size
    "45 %", "25 ms", "20 %", "0.3 MB", "5 %", "10 MB",
}  # fmt: skip


def graphs() -> str:
    times = [seconds(gpu(f"{ENGINE}, {GRAPH}", T).median) for T in (150, 847, 1203)]
    return f"{times[0]}, {times[1]} and {times[2]}"


def graph_in_steps_of_256() -> Record:
    (found,) = (r for r in RESULT.gpu if r.group == "steps" and r.classes == 256 and GRAPH in r.run)
    return found


def predicted_model() -> float:
    """Return the seconds of a whole picture in a graph, if its aggregator took as long as the prototypes."""
    prototypes = predictions.read_prototypes(RESULTS)
    milliseconds = predictions.call_milliseconds(prototypes, "prototype", 150)
    return RESULT.find(f"engine, {GRAPH}", MODEL).median - median("graph") + milliseconds / 1e3


def compile_seconds() -> float:
    runs = raw("torch-compile")["runs"]
    assert isinstance(runs, dict)
    return float(runs["v2-vitl T=150 B=5 bfloat16 compiled"]["compile_s"])


def ceiling(name: str) -> str:
    value = raw("first-run")[name]
    assert isinstance(value, float)
    return three_digits(value)


def kernel_tests() -> str:
    passed, failed = (raw("kernel-tests")[name] for name in ("passed", "failed"))
    assert isinstance(passed, int)
    assert isinstance(failed, list)
    return f"of {passed + len(failed)} tests of kernels at full size {passed} passed"


def assumed(chip: str) -> str:
    rates = json.loads((RESULTS / "predicted.json").read_text())["assumed"][chip]
    return f"{rates['TFLOP/s']} TFLOP/s and {rates['TB/s']:.1f} TB/s for an {chip}"


def texts() -> dict[str, str]:
    """Return README's and BENCHMARKS' text on figures without tables and code, and class_parallel's text."""
    found = {}
    for name in ("README.md", "BENCHMARKS.md", "docs/class_parallel.md"):
        text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        found[name] = " ".join(BLOCK.sub("", text).split())
    found["README.md"] = found["README.md"].split("## Figures")[1].split("## Three examples")[0]
    return found


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_tables_have_the_figures_of_the_results(name: str) -> None:
    """`python -m bench.documents` fills them in."""
    text = (ROOT / name).read_text()
    assert "h200" in {match[1] for match in BLOCK.findall(text)} or name != "README.md"
    assert fill(text, RESULT) == text


def test_every_table_is_in_a_document() -> None:
    found = [
        name
        for document in documents.DOCUMENTS
        for _, name, _ in BLOCK.findall((ROOT / document).read_text())
    ]
    assert set(found) == set(TABLES)


def test_another_result_makes_a_document_outdated(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "h200" / "tuned-run.json"
    content = json.loads(path.read_text())
    content["runs"]["v2-vitl T=150 B=5 float16 triton"]["graph"]["median"] = 9.99
    path.write_text(json.dumps(content))
    text = (ROOT / "README.md").read_text()
    assert fill(text, Results(tmp_path / "results")).replace("9.99 ms", "10.8 ms") == text


def test_a_table_of_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"table: 'h300' is not one of h200"):
        fill("<!-- table: h300 -->\n<!-- end of table -->", RESULT)


@pytest.mark.parametrize("claim", CLAIMS)
def test_figures_in_the_text_are_those_of_the_results(claim: str) -> None:
    found = CLAIMS[claim]()
    assert found
    assert found in claim
    assert any(claim in text for text in texts().values()), "the text says something else"


@pytest.mark.parametrize("name", ["README.md", "BENCHMARKS.md"])
def test_no_figure_in_the_text_is_without_a_result(name: str) -> None:
    text = texts()[name]
    for claim in CLAIMS:
        text = text.replace(claim, "")
    unknown = {"".join(match) for match in FIGURE.findall(text)} - NOT_MEASURED
    assert not unknown


def test_the_h200s_files_say_what_was_measured_on_what() -> None:
    for path in (RESULTS / "h200").glob("*.json"):
        content = json.loads(path.read_text())
        assert (content["gpu"], content["commit"]) == ("NVIDIA H200", "2c79cdd")
        assert [content[name] for name in ("torch", "triton", "python")] == ["2.11.0+cu130", "3.6.0", "3.12"]
    assert {record.run for record in RESULT.gpu if DEFAULT_CONFIGS in record.run}
