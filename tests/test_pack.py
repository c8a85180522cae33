"""A campaign packed for a machine without a network, and the import of its results."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import meter, pack, ship, unpack
from bench.measure import Timing
from bench.records import append
from catseg_fast.kernels.launch import config_files
from support.bench_records import make_record

ROOT = Path(__file__).parent.parent
NONE = pack.Wheels(())

# Stands in for the campaign: writes its arguments to the folder of results.
CAMPAIGN = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(exist_ok=True)
(folder / "arguments").write_text(" ".join(sys.argv[1:]))
sys.exit(1)
"""


def in_a_checkout() -> bool:
    done = subprocess.run(("git", "rev-parse"), cwd=ROOT, capture_output=True)
    return done.returncode == 0


needs_git = pytest.mark.skipif(not in_a_checkout(), reason="packs what git tracks")

pytestmark = pytest.mark.xdist_group("pack")  # one process packs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed campaign without wheels."""
    folder = tmp_path_factory.mktemp("pack") / "campaign"
    pack.pack(folder, 5, NONE)
    return folder


@needs_git
def test_the_tree_runs_from_where_it_is_put(packed: Path) -> None:
    """The copy has files instead of links, and the commit in a file."""
    tree = packed / "tree"
    assert not [path for path in tree.rglob("*") if path.is_symlink()]
    assert (tree / "COMMIT").read_text().strip() == meter.commit()
    code = (
        "import catseg_fast.kernels.launch.config_files as c, bench.campaign, bench.meter; "
        "print(c.__file__); print(bench.meter.commit())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    file, commit = done.stdout.split("\n")[:2]
    assert Path(file).is_relative_to(tree)
    assert commit == meter.commit()


@needs_git
def test_its_script_runs_the_campaign_and_packs_the_results(packed: Path) -> None:
    campaign = packed / "tree" / "bench" / "campaign.py"
    campaign.write_text(CAMPAIGN)
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [packed / "run.sh", "--minutes", "20"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, "the campaign's"
    assert "results.tar.gz" in done.stdout
    with tarfile.open(packed / "results.tar.gz") as archive:
        (member,) = (member for member in archive if member.isfile())
        content = archive.extractfile(member)
        assert content is not None
        arguments = content.read().decode()
    assert arguments == f"--minutes 5 --parallel-checks --output {packed}/results --minutes 20"


@needs_git
def test_wheels_are_taken_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels").mkdir()
    arguments = [str(tmp_path / "new"), "--missing", "ftfy", "--wheels", str(tmp_path / "wheels")]
    assert pack.main(arguments) == 1
    error = capsys.readouterr().err
    assert "pip finds no wheel of one of ftfy==" in error
    assert "--missing '' does without" in error


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert pack.main([str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_results_come_back_with_their_report_and_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    append(tmp_path / "kernels.jsonl", make_record("x", Timing(1, 1, 1, 5)))
    entry = {
        "kernel": "mlp", "dtype": "bf16", "precision": "ieee", "gpu": "NVIDIA H100",
        "shape": {"crop_classes": 255}, "config": {},
    }  # fmt: skip
    tuned = f"results/{ship.TUNED}/nvidia-h100/window_block.json"
    files = {
        "results/kernels.jsonl": (tmp_path / "kernels.jsonl").read_bytes(),
        "results/empty.jsonl": b"",
        tuned: json.dumps([entry]).encode(),
    }
    monkeypatch.setattr(ship, "PACKAGE", tmp_path / "package")
    folder = tmp_path / "h100"
    assert unpack.main([str(make_archive(tmp_path / "results.tar.gz", files)), str(folder)]) == 0
    assert (folder / "report" / "table.md").exists()
    assert (folder / "report" / "roofline.png").exists()
    shipped = config_files.config_path(tmp_path / "package", "NVIDIA H100", "window_block")
    assert config_files.read(shipped, "NVIDIA H100") == [entry]
    output = capsys.readouterr().out
    assert "1 tuned configs are in" in output
    assert f"{folder}: 1 files of records" in output


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "is empty"),
        ({"other/kernels.jsonl": b"x"}, "it holds 'other/kernels.jsonl'"),
        ({"results/../../kernels.jsonl": b"x"}, "it holds 'results/../../kernels.jsonl'"),
        ({"results": b"x"}, "it holds 'results'"),
    ],
)
def test_other_archives_are_refused(
    files: dict[str, bytes], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = make_archive(tmp_path / "results.tar.gz", files)
    assert unpack.main([str(archive), str(tmp_path / "new")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.tar.gz").write_bytes(b"no archive")
    assert unpack.main([str(tmp_path / "results.tar.gz"), str(tmp_path / "new")]) == 1
    assert "is not an archive of results" in capsys.readouterr().err
    assert unpack.main([str(tmp_path / "missing"), str(tmp_path / "new")]) == 1
    assert "missing" in capsys.readouterr().err
