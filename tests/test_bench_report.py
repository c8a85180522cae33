"""The benchmarks' gate, their records, and the report's regression mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gate, records, report
from bench.baselines import BASELINES
from bench.cases import Case, make_call
from bench.flops import call_flop
from bench.measure import Timing, time_call
from bench.records import Record
from bench.stage_calls import STAGES, bind, make_inputs
from catseg_fast import stages
from catseg_fast.plan import cast

CPU = torch.device("cpu")


def make_record(name: str, timing: Timing, **facts: object) -> Record:
    known = {
        "group": "kernels", "case": "decode, t=2, B=1, fp32", "run": "torch", "device": "a device",
        "matmul_rate": 1e12, "copy_bandwidth": 1e11, "flop": 1e9, "least_bytes": 10**7,
    }  # fmt: skip
    return Record(id=name, **vars(timing), **{**known, **facts})


def write_benchmark_file(path: Path, found: list[Record]) -> Path:
    """As pytest-benchmark writes it."""
    benchmarks = [{"name": record.id, "extra_info": {"record": asdict(record)}} for record in found]
    path.write_text(json.dumps({"benchmarks": [*benchmarks, {"name": "another", "extra_info": {}}]}))
    return path


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[str, int], Path]:
    """Time some matrix products, the last one as often as is said, into a file."""
    x = torch.randn(256, 256)

    def measure(name: str, repeats: int) -> Path:
        def product(times: int) -> None:
            for _ in range(times):
                x @ x

        timings = {
            "first": time_call(lambda: product(8), CPU),
            "second": time_call(lambda: product(repeats), CPU),
        }
        return write_benchmark_file(tmp_path / name, [make_record(*item) for item in timings.items()])

    return measure


def test_a_deliberately_slowed_kernel_is_a_regression(
    measured: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    old, slowed = measured("old.json", 8), measured("new.json", 400)
    assert report.main(["--compare", str(old), str(slowed)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| second"))
    assert "SLOWER" in line
    assert line.count("(") == 2, "both spreads are shown"
    assert report.main(["--compare", str(old), str(old)]) == 0


@pytest.mark.parametrize(("change", "code"), [(1.04, 0), (1.06, 1), (0.5, 0)])
def test_five_per_cent_pass_for_noise(tmp_path: Path, change: float, code: int) -> None:
    old, new = (
        write_benchmark_file(tmp_path / f"{name}.json", [make_record("x", Timing(s, s, s, 5))])
        for name, s in (("old", 1.0), ("new", change))
    )
    assert report.main(["--compare", str(old), str(new)]) == code


def test_results_of_different_devices_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record("x", Timing(1, 1, 1, 5))
    old = write_benchmark_file(tmp_path / "old.json", [record])
    new = write_benchmark_file(tmp_path / "new.json", [replace(record, device="another")])
    assert report.main(["--compare", str(old), str(new)]) == 2
    assert "another" in capsys.readouterr().err


def test_records_are_kept_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    first, second = (make_record("x", Timing(s, s, s, 5)) for s in (1.0, 2.0))
    for record in (first, replace(first, id="y"), second):
        records.append(path, record)
    with path.open("a") as file:
        file.write('{"id": "cut sho')
    assert records.read([path]) == [second, replace(first, id="y")]


def test_report_has_a_row_for_each_record_and_the_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timing = Timing(2e-3, 1e-3, 3e-3, 5)
    scaling = {"group": "scaling", "peak_bytes": 2**20}
    found = [
        make_record("kernel", timing),
        *(
            make_record(f"{run}{T}", timing, **scaling, case=f"v2-vitl, T={T}, B=1", run=run, classes=T)
            for T in (4, 16)
            for run in ("(a) reference", "(d) engine")
        ),
        *(make_record(step, timing, group="ablation", run=step) for step in ("reference", "+ streaming")),
    ]
    text = report.write([write_benchmark_file(tmp_path / "r.json", found)], tmp_path / "report")
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(found) + 2
    assert "0.5" in next(line for line in text.splitlines() if "decode" in line), "1 GFLOP in 2 ms"
    drawn = {path.name for path in (tmp_path / "report").iterdir()}
    assert drawn == {"table.md", "time.png", "memory.png", "roofline.png", "ablation.png"}


def test_report_of_no_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        report.main([str(write_benchmark_file(tmp_path / "none.json", [])), "--output", str(tmp_path)]) == 2
    )
    assert "no results" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_a_deliberately_wrong_kernel_does_not_pass_the_gate(stage: str) -> None:
    class Wrong:
        """Drops the last channel, class or pixel of what a stage computes."""

        def __getattr__(self, name: str) -> Callable[..., object]:
            right = getattr(stages, name)

            def wrong(*arguments: object) -> object:
                answer = right(*arguments)
                if isinstance(answer, Tensor):
                    answer[..., -1] = 0
                else:  # class_collect leaves its answer in the memory
                    arguments[1].key_value[..., -1] = 0  # type: ignore[attr-defined]
                return answer

            return wrong

    inputs = make_inputs(stage, 1, 2, torch.float32, CPU)
    call = bind(stage, inputs)
    truth = bind(stage, cast(inputs, torch.float64))(stages)
    assert gate.check(call(stages), call(stages), truth) == 1
    with pytest.raises(gate.WrongAnswer, match="no speed"):
        gate.check(call(Wrong()), call(stages), truth)


def test_the_gate_stops_numbers_that_are_none() -> None:
    truth = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(gate.WrongAnswer):
        gate.check(torch.full((4,), torch.nan), torch.full((4,), 0.1), truth)
    with pytest.raises(gate.WrongAnswer, match="shape"):
        gate.check(torch.zeros(3), torch.zeros(4), truth)


@pytest.mark.parametrize("variant", ["v2-vitl", "v1-vitl-swinb"])
def test_operations_are_those_of_the_design(variant: str) -> None:
    """DESIGN: GFLOP a class and crop of the reference, and of the restructured maths at most."""
    reference, ours = (flop / (256 * 5) / 1e9 for flop in call_flop(Case(variant, 256, 5)))
    assert reference == pytest.approx({"v2-vitl": 2.88, "v1-vitl-swinb": 3.52}[variant], abs=0.01)
    assert 1.5 < ours < 2.5


def test_dropped_classes_cost_their_selection_alone() -> None:
    few, all_aggregated, dropping = (
        call_flop(Case("v2-vitl", classes, dtype=torch.float16, max_classes=kept))
        for classes, kept in ((256, None), (512, None), (512, 256))
    )
    for kept, every, some in zip(few, all_aggregated, dropping, strict=True):
        assert kept < some < 1.01 * kept
        assert some < 0.6 * every


def test_baselines_say_where_they_do_not_run() -> None:
    bf16 = Case("v2-vitl", 4, dtype=torch.bfloat16)
    reasons = {baseline.name[:3]: baseline.unavailable(bf16, CPU) for baseline in BASELINES}
    assert reasons["(b)"] is reasons["(c)"] is reasons["(d)"] is None
    assert "dtype" in reasons["(a)"] or "float" in reasons["(a)"]
    assert "GPU" in reasons["(e)"]


@pytest.mark.parametrize("start", ["(a)", "(d)"])
def test_a_baseline_computes_the_case(start: str) -> None:
    case = Case("v1-vitl-swinb", 2)
    baseline = next(baseline for baseline in BASELINES if baseline.name.startswith(start))
    answer = baseline.prepare(make_call(case))()
    assert gate.check(answer, *gate.expected(case, case.dtype, CPU)) <= gate.FACTOR
