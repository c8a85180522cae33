"""Put a campaign into one folder, for a machine with a GPU and PyTorch but without a network.

    python -m bench.pack campaign --minutes 5

The folder gets this tree, wheels of the packages that such a machine lacks, and `run.sh`, which runs the
campaign and packs the results into `results.tar.gz`. `python -m bench.unpack results.tar.gz FOLDER` unpacks
them here. The machine needs Linux, PyTorch, Triton, and those dependencies of this package that no wheel
provides (`--missing` names more); also pytest, pytest-benchmark and, for checks in parallel, pytest-xdist.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.meter import commit
from bench.runner import ROOT, size

MISSING = ("open_clip_torch", "ftfy", "wcwidth")  # in PyTorch's usual images
RUN = """\
#!/bin/sh
# Runs the campaign on this machine's GPU; call it again to go on where it stopped.
# More time: ./run.sh --minutes 20
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
if ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade \\
        --target "$here/site" "$here"/wheels/*.whl || exit
fi
export PYTHONPATH="$here/site:$here/tree"
cd "$here/tree" || exit
trap : INT  # of the campaign, whose results are packed all the same
"$python" -m bench.campaign --minutes {minutes:g} --parallel-checks --output "$here/results" "$@"
code=$?
if [ -d "$here/results" ]; then
    tar -czf "$here/results.tar.gz" -C "$here" results
    echo "fetch $here/results.tar.gz"
fi
exit $code
"""


@dataclass(frozen=True)
class Wheels:
    """Packages that a machine lacks.

    Attributes:
        names: names of packages, in the versions that are installed here.
        folder: folder with their wheels; None to download them.
        platforms: platforms of the machine, as pip names them; empty for that of this machine.
    """

    names: Sequence[str] = MISSING
    folder: Path | None = None
    platforms: Sequence[str] = ()

    def fetch(self, target: Path) -> None:
        """Put the wheels into a folder.

        Raises:
            RuntimeError: if a package has no wheel.
        """
        if not self.names:
            return
        local = () if self.folder is None else ("--no-index", "--find-links", str(self.folder))
        platforms = [word for name in self.platforms for word in ("--platform", name)]
        asked = [_pinned(name) for name in self.names]
        done = subprocess.run(
            (
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"),
                *(*local, *platforms, "--dest", str(target), *asked),
            ),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"wheels: pip finds no wheel of one of {', '.join(asked)}; --wheels FOLDER takes them from a "
                f"folder, --missing '' does without. pip says: {done.stderr.strip()[-500:]}"
            )


def pack(folder: Path, minutes: float, wheels: Wheels) -> None:
    """Fill a new or empty folder with a campaign of some minutes.

    Raises:
        ValueError: if the folder is not empty.
        RuntimeError: if a package has no wheel.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    wheels.fetch(folder / "wheels")
    copy_tree(folder / "tree")
    run = folder / "run.sh"
    run.write_text(RUN.format(minutes=minutes), encoding="utf-8")
    run.chmod(0o755)


def copy_tree(target: Path) -> None:
    """Copy the working tree without files that git ignores, and with files in place of links.

    `COMMIT` in the copy names the commit.
    """
    listed = subprocess.run(
        ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():  # a link to a folder
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():  # and was not deleted since
            shutil.copy2(source, copy)
    (target / "COMMIT").write_text(f"{commit()}\n", encoding="utf-8")


def _pinned(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 if nothing was packed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--minutes", type=float, default=5, help="of the campaign")
    parser.add_argument(
        "--missing", default=",".join(MISSING), metavar="NAMES", help="packages that the machine lacks"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="where their wheels are")
    parser.add_argument(
        "--platform", action="append", default=[], metavar="NAME",
        help="of the machine, if it is not of this one's kind; as manylinux2014_aarch64, repeatable",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.missing.split(",") if name.strip()]
    try:
        pack(options.folder, options.minutes, Wheels(names, options.wheels, options.platform))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.folder} holds {size(options.folder) / 1e6:.1f} MB; on the machine with the GPU: ./run.sh"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
