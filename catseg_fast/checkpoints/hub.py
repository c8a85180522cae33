"""Sources of weights: files, folders, and repositories of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from catseg_fast.errors import InputError, RunError
from catseg_fast.files import file_digest, open_regular

# Upstream's weights, by variant: the kind of repository, its id, the file.
PUBLISHED = {
    "v1-vitb-r101": ("model", "hamacojr/CAT-Seg", "model_final_base.pth"),
    "v1-vitl-swinb": ("model", "hamacojr/CAT-Seg", "model_final_large.pth"),
    "v1-vith-swinb": ("model", "hamacojr/CAT-Seg", "model_final_huge.pth"),
    "v1-vitg-swinb": ("model", "hamacojr/CAT-Seg", "model_final_giant.pth"),
    "v2-vitb": ("space", "hamacojr/CAT-Seg-weights", "model_base.pth"),
    "v2-vitl": ("space", "hamacojr/CAT-Seg-weights", "model_large.pth"),
}
# Weights that come with the package, by variant.
BUNDLED = {"demo": Path(__file__).parent / "demo.safetensors"}
SPACES = {repository for kind, repository, _ in PUBLISHED.values() if kind == "space"}

_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError)

PROBE_SECONDS = 5

WEIGHTS = (".safetensors", ".pth", ".pt")
PREFERRED = "model.safetensors"


def resolve(
    source: str | os.PathLike[str], *, revision: str | None = None, sha256: str | None = None
) -> Path:
    """Return the file of `source`, downloaded from the Hugging Face Hub if it is not on this machine.

    Args:
        source: a file; a folder that holds one checkpoint (or a `model.safetensors`); a variant's name such
            as "v2-vitl" (upstream's weights) or "demo" (in the package); a hub id "owner/name" or
            "owner/name/path/to/file.pth". A hub id or a variant's name may end in "@revision", and
            everything in "#sha256=…", for the two arguments below.
        revision: branch, tag or commit of the hub's repository; by default its main branch. Only a commit's
            hash never changes.
        sha256: SHA-256 that the file must have, as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: if there is no such file, repository, or file in the repository.
        InputError: if a folder or a repository holds several checkpoints or none, a revision is given for
            a source that is not on the hub, or the file's digest differs.
        RunError: if the hub cannot be reached; the message says what to do.
    """
    if not os.path.exists(os.path.expanduser(source)):
        source, revision, sha256 = _split_pins(os.fspath(source), revision, sha256)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise InputError(f"sha256: expected 64 hexadecimal digits, got {sha256!r}")
    path = _local(source)
    if path is None:
        path = _download(*_remote(os.fspath(source)), revision)
    elif revision is not None:
        raise InputError(f"revision: {revision!r} was given for {source}, which is not on the hub")
    if sha256 is not None:
        _check_digest(path, sha256.lower())
    return path


def _split_pins(source: str, revision: str | None, sha256: str | None) -> tuple[str, str | None, str | None]:
    """Split "@revision" and "#sha256=…" from the end of a source."""
    source, mark, found = source.partition("#sha256=")
    if mark and sha256 is not None:
        raise InputError(f"sha256: is given twice, as {sha256!r} and as {found!r}")
    sha256 = found if mark else sha256
    if not os.path.exists(os.path.expanduser(source)):
        source, mark, found = source.partition("@")
        if mark and revision is not None:
            raise InputError(f"revision: is given twice, as {revision!r} and as {found!r}")
        revision = found if mark else revision
    if revision == "":
        raise InputError(f"revision: is empty for {source}")
    return source, revision, sha256


def _local(source: str | os.PathLike[str]) -> Path | None:
    """Return the file on this machine, if `source` is a file, a folder, or the name of bundled weights."""
    if source == "":  # as a path, the current folder
        raise InputError("weights: the path is empty")
    path = Path(source).expanduser()
    if path.is_dir():
        return path / _pick((entry.name for entry in path.iterdir() if entry.is_file()), str(path))
    if path.exists():
        open_regular(path).close()
        return path
    return BUNDLED.get(os.fspath(source))


def _remote(name: str) -> tuple[str, str, str | None]:
    """Return kind and id of the hub's repository of a variant's name or hub id, and the file if named.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    parts = name.split("/")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/\w[^\\:]*)?", name) is not None
    if not named or (len(parts) == 2 and name.endswith((*WEIGHTS, ".pkl", ".bin"))):
        published = ", ".join(PUBLISHED)
        raise FileNotFoundError(
            f"weights: there is no file or folder {name}; hub ids are owner/name or owner/name/file, "
            f"and upstream's weights have the names {published}"
        )
    repository = "/".join(parts[:2])
    return "space" if repository in SPACES else "model", repository, "/".join(parts[2:]) or None


def _check_digest(path: Path, expected: str) -> None:
    with open_regular(path) as file:
        found = file_digest(file, "sha256")
    if found != expected:
        raise InputError(f"{path}: expected SHA-256 {expected}, found {found}")


def _pick(names: Iterable[str], where: str) -> str:
    """Return the only checkpoint among `names`."""
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    if PREFERRED in weights:
        return PREFERRED
    if len(weights) != 1:
        found = f"several checkpoints ({', '.join(weights)}): name one" if weights else "no checkpoint"
        raise InputError(f"weights: {where} holds {found}; looked for {', '.join(WEIGHTS)}")
    return weights[0]


def _download(kind: str, repository: str, filename: str | None, revision: str | None) -> Path:
    """Return the file in the hub's cache; with `filename` None, the only checkpoint of the repository."""
    problem = None if constants.HF_HUB_OFFLINE else _connection_problem()
    if filename is None:
        with _clear_errors(kind, repository, "<file>", revision, problem):
            files = huggingface_hub.HfApi().list_repo_files(repository, repo_type=kind, revision=revision)
        filename = _pick(files, f"the hub's {kind} {repository}")
    with _clear_errors(kind, repository, filename, revision, problem):
        path = huggingface_hub.hf_hub_download(repository, filename, repo_type=kind, revision=revision)
    return Path(path)


def _connection_problem() -> Exception | None:
    """Return why the hub cannot be reached, or None; the library itself retries for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # requests' or httpx's, by version
        return error
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """Let the library look in its cache only."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _clear_errors(
    kind: str, repository: str, filename: str, revision: str | None, problem: Exception | None
) -> Iterator[None]:
    """Say what to do about a failed request to the hub; make none if there is a `problem` with it."""
    label = f"{repository}/{filename}" + (f" at revision {revision!r}" if revision else "")
    try:
        with nullcontext() if problem is None else _offline():
            yield
    except Exception as error:  # of the hub, requests or httpx, depending on versions
        reason = (str(problem or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        absent = isinstance(error, _ABSENT)
        if absent and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"weights: {label} is not on this machine, and the hub has no such public {kind}: {reason}"
            ) from error
        space = "spaces/" if kind == "space" else ""
        offline = " HF_HUB_OFFLINE is set: unset it to allow downloads." if constants.HF_HUB_OFFLINE else ""
        raise RunError(
            f"weights: {label} is neither a file nor in the cache ({constants.HF_HUB_CACHE}), "
            f"and fetching failed: {reason}.{offline} Without network access, download "
            f"https://huggingface.co/{space}{repository}/resolve/{revision or 'main'}/{filename} elsewhere, "
            "copy it here and pass its path instead; or copy the cache of a machine that has it (HF_HOME)."
        ) from error
