"""Folders that one run at a time writes to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from catseg_fast.data.published import import_dataset
from catseg_fast.data.scenes import write_dataset
from catseg_fast.errors import RunError
from catseg_fast.files import exclusive
from support.training_run import make_trainer


def scenes(folder: Path) -> None:
    write_dataset(folder, "train", 1, size=(32, 32))


def imported(folder: Path) -> None:
    for name, mode in (("im", "RGB"), ("gt", "L")):
        (folder / name).mkdir(exist_ok=True)
        Image.new(mode, (4, 4)).save(folder / name / "a.png")
    import_dataset(folder / "im", folder / "gt", ["sky"], folder)


def trained_anew(folder: Path) -> None:
    make_trainer(folder, steps=1, batch_size=1, warmup=0).run()


@pytest.mark.parametrize("write", [scenes, imported, trained_anew], ids=lambda write: write.__name__)
def test_a_second_run_on_one_folder_is_refused(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl", reason="needs a system that can lock a folder")
    monkeypatch.setattr("catseg_fast.training.trainer.HOLDING", 0.1)
    with exclusive(tmp_path), pytest.raises(RunError) as caught:
        write(tmp_path)
    assert str(caught.value) == f"{tmp_path} is in use by another run, which writes to it"
    assert not (tmp_path / "classes.json").exists()
    assert not (tmp_path / "log.jsonl").exists()


def test_the_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="needs a system that can lock a folder")
    code = "import os, sys, time\nfrom pathlib import Path\nfrom catseg_fast.files import exclusive\n"
    code += "with exclusive(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(RunError), exclusive(tmp_path, seconds=0):
            pass
        child.kill()
        child.wait()
        with exclusive(tmp_path, seconds=1):
            assert not list(tmp_path.iterdir())
