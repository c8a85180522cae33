"""Where weights are: a file, a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from catseg_fast.errors import RunError

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

WEIGHTS = (".safetensors", ".pth", ".pt")
PREFERRED = "model.safetensors"


def resolve(source: str | os.PathLike[str]) -> Path:
    """The file that `source` stands for, fetched from the Hugging Face Hub where it is not on this machine.

    Args:
        source: a file; a folder that holds one checkpoint (or a `model.safetensors`); a variant's name such
            as "v2-vitl" (upstream's weights) or "demo" (in the package); a hub id "owner/name" or
            "owner/name/path/to/file.pth".

    Raises:
        FileNotFoundError: if there is no such file, repository, or file in the repository.
        ValueError: if a folder or a repository holds several checkpoints or none.
        RuntimeError: if the hub cannot be reached; the message says what to do.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / _pick((entry.name for entry in path.iterdir() if entry.is_file()), str(path))
    name = os.fspath(source)
    if name in BUNDLED:
        return BUNDLED[name]
    if name in PUBLISHED:
        return _download(*PUBLISHED[name])
    parts = name.split("/")
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/\w[^\\:]*)?", name) is not None
    if not named or (len(parts) == 2 and name.endswith((*WEIGHTS, ".pkl", ".bin"))):
        published = ", ".join(PUBLISHED)
        raise FileNotFoundError(
            f"weights: there is no file or folder {name}; hub ids are owner/name or owner/name/file, "
            f"and upstream's weights have the names {published}"
        )
    repository = "/".join(parts[:2])
    return _download("space" if repository in SPACES else "model", repository, "/".join(parts[2:]) or None)


def _pick(names: Iterable[str], where: str) -> str:
    """The one checkpoint among `names`."""
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    if PREFERRED in weights:
        return PREFERRED
    if len(weights) != 1:
        found = f"several checkpoints ({', '.join(weights)}): name one" if weights else "no checkpoint"
        raise ValueError(f"weights: {where} holds {found}; looked for {', '.join(WEIGHTS)}")
    return weights[0]


def _download(kind: str, repository: str, filename: str | None) -> Path:
    """The file in the hub's cache; `filename` None picks the only checkpoint of the repository."""
    if filename is None:
        with _clear_errors(kind, repository, "<file>"):
            files = huggingface_hub.HfApi().list_repo_files(repository, repo_type=kind)
        filename = _pick(files, f"the hub's {kind} {repository}")
    with _clear_errors(kind, repository, filename):
        path = huggingface_hub.hf_hub_download(repository, filename, repo_type=kind)
    return Path(path)


@contextmanager
def _clear_errors(kind: str, repository: str, filename: str) -> Iterator[None]:
    """Say what to do about a failed request to the hub."""
    label = f"{repository}/{filename}"
    try:
        yield
    except Exception as error:  # the hub's own, requests' or httpx's, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        absent = isinstance(error, (RepositoryNotFoundError, EntryNotFoundError, HFValidationError))
        if absent and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"weights: {label} is not on this machine, and the hub has no such public {kind}: {reason}"
            ) from error
        space = "spaces/" if kind == "space" else ""
        offline = " HF_HUB_OFFLINE is set: unset it to allow downloads." if constants.HF_HUB_OFFLINE else ""
        raise RunError(
            f"weights: {label} is neither a file nor in the cache ({constants.HF_HUB_CACHE}), "
            f"and fetching failed: {reason}.{offline} Without network access, download "
            f"https://huggingface.co/{space}{repository}/resolve/main/{filename} elsewhere, copy it here and "
            "pass its path instead; or copy the cache of a machine that has it (HF_HOME)."
        ) from error
