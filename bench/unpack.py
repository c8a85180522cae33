"""Add the results of a campaign on another machine to this checkout.

    python -m bench.unpack results.tar.gz bench/results/h100

unpacks the results, draws their report, and adds the tuned configs to catseg_fast/configs/.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bench import ship
from bench.report import write as write_report
from bench.runner import MOST_BYTES
from catseg_fast.files import replacing


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of `run.sh` into a folder; files of the same name are replaced.

    Raises:
        ValueError: if it is not such an archive, or is too large.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = [member for member in tar.getmembers() if not member.isdir()]
            _check(archive, members)
            for member in members:
                content = tar.extractfile(member)
                assert content is not None
                target = folder.joinpath(*PurePosixPath(member.name).parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_bytes(content.read())
    except tarfile.TarError as error:
        raise ValueError(f"{archive}: is not an archive of results: {error}") from None


def _check(archive: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """Check the content of an archive before it is unpacked."""
    for member in members:
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or len(parts) < 2 or parts[0] != "results" or ".." in parts:
            raise ValueError(f"{archive}: is not an archive of results: it holds {member.name!r}")
    if not members:
        raise ValueError(f"{archive}: is not an archive of results: it is empty")
    total = sum(member.size for member in members)
    if total > 2 * MOST_BYTES:
        raise ValueError(
            f"{archive}: holds {total / 1e6:.0f} MB, a campaign {MOST_BYTES / 1e6:.0f} MB at most"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 1 if nothing was unpacked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="results.tar.gz of run.sh")
    parser.add_argument("folder", type=Path, help="where the results go, as bench/results/h100")
    options = parser.parse_args(arguments)
    try:
        unpack(options.archive, options.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    measured = sorted(path for path in options.folder.glob("*.jsonl") if path.stat().st_size)
    if measured:
        print(write_report(measured, options.folder / "report"))
    if shipped := ship.ship(options.folder, ship.PACKAGE):
        print(ship.describe(shipped))
    print(f"{options.folder}: {len(measured)} files of records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
