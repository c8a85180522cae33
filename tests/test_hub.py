"""Finding weights: files, folders, the bundled ones, the Hugging Face Hub; and pinning them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from catseg_fast.checkpoints.checkpoint import read_checkpoint, recognise_variant
from catseg_fast.checkpoints.hub import resolve
from catseg_fast.config import VARIANTS
from catseg_fast.model import CATSeg


class Hub:
    """The hub's two calls, which record the request and answer with a path or an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Exception | None = None) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.revisions: list[str | None] = []
        self.path: Path | None = None
        self.files: list[str] = []
        self.answer = answer
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)

    def download(self, repository: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        self.asked.append((repo_type, repository, filename))
        self.revisions.append(revision)
        if self.answer:
            raise self.answer
        return str(self.path or f"/cache/{filename}")

    def list_repo_files(self, repository: str, *, repo_type: str, revision: str | None) -> list[str]:
        self.revisions.append(revision)
        if self.answer:
            raise self.answer
        return self.files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("v2-vitb", ("space", "hamacojr/CAT-Seg-weights", "model_base.pth")),
        ("v2-vitl", ("space", "hamacojr/CAT-Seg-weights", "model_large.pth")),
        ("v1-vitb-r101", ("model", "hamacojr/CAT-Seg", "model_final_base.pth")),
        (
            "hamacojr/CAT-Seg-weights/model_large.pth",
            ("space", "hamacojr/CAT-Seg-weights", "model_large.pth"),
        ),
        ("hamacojr/CAT-Seg/model_final_huge.pth", ("model", "hamacojr/CAT-Seg", "model_final_huge.pth")),
        ("some-one/my.model/a/b.safetensors", ("model", "some-one/my.model", "a/b.safetensors")),
    ],
)
def test_hub_ids(source: str, asked: tuple[str, str, str], hub: Hub) -> None:
    assert resolve(source) == Path("/cache") / asked[2]
    assert hub.asked == [asked]


def test_every_variant_has_weights(hub: Hub) -> None:
    found = {name: resolve(name) for name in VARIANTS}
    assert len({tuple(asked) for asked in hub.asked}) == len(VARIANTS) - 1
    assert found["demo"].is_file()
    assert recognise_variant(read_checkpoint(found["demo"])) is VARIANTS["demo"]


def test_a_repository_without_a_file_name(hub: Hub) -> None:
    hub.files = ["README.md", "weights.pth"]
    assert resolve("some/model") == Path("/cache/weights.pth")
    hub.files += ["model.safetensors"]
    assert resolve("some/model") == Path("/cache/model.safetensors")
    hub.files = ["model_base.pth", "model_large.pth"]
    with pytest.raises(
        ValueError, match=r"several checkpoints \(model_base\.pth, model_large\.pth\): name one"
    ):
        resolve("hamacojr/CAT-Seg-weights")
    hub.files = ["README.md"]
    with pytest.raises(ValueError, match="no checkpoint"):
        resolve("some/model")


def test_files_and_folders_come_first(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "some" / "model" / "weights.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert resolve("some/model/weights.pth") == Path("some/model/weights.pth")
    assert resolve("some/model") == Path("some/model/weights.pth")
    assert resolve(file) == file
    assert resolve(file.parent) == file
    (file.parent / "other.safetensors").touch()
    with pytest.raises(ValueError, match=r"several checkpoints \(other\.safetensors, weights\.pth\)"):
        resolve(file.parent)
    (file.parent / "model.safetensors").touch()
    assert resolve(file.parent).name == "model.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint"):
        resolve("empty")
    with pytest.raises(ValueError, match="weights: the path is empty"):
        resolve("")
    assert not hub.asked


@pytest.mark.parametrize(
    "source", ["none.pth", "folder/none.pth", "/none/at/all.pth", "./some/model", "v3-vitb", "C:\\w.pth"]
)
def test_missing_paths_are_not_looked_up_online(source: str, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*v2-vitl"):
        resolve(source)
    assert not hub.asked


@pytest.mark.parametrize("source", ["no/such", "no/such/file.pth"])
@pytest.mark.parametrize("kind", [RepositoryNotFoundError, EntryNotFoundError, RevisionNotFoundError])
def test_not_on_the_hub(source: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind.__new__(kind, "404 Client Error")  # its constructor wants an HTTP response
    Hub(monkeypatch, error)
    with pytest.raises(FileNotFoundError, match=r"no/such.* is not on this machine, and the hub has no such"):
        resolve(source)


@pytest.mark.parametrize("source", ["v2-vitl", "hamacojr/CAT-Seg-weights"])
@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("not cached"), OSError("no route"), ConnectionError("offline mode")],
    ids=lambda error: type(error).__name__,
)
def test_offline_says_what_to_do(source: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError) as caught:
        resolve(source)
    message = str(caught.value)
    assert "https://huggingface.co/spaces/hamacojr/CAT-Seg-weights/resolve/main/" in message
    assert huggingface_hub.constants.HF_HUB_CACHE in message
    assert str(error) in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "pass its path" in message


# ---- pinning ----------------------------------------------------------------------------------------------

COMMIT = "9f3c1e0d2b4a5968778695a4b3c2d1e0f9e8d7c6"
CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WRONG = "0" * 64


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "cached.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("source", ["v2-vitl", "some/model", "some/model/a/b.pth"])
@pytest.mark.parametrize("revision", [COMMIT, "v1.0", "refs/pr/3", "user@host"])
def test_a_revision_is_asked_for(source: str, revision: str, hub: Hub) -> None:
    hub.files = ["weights.pth"]
    expected = resolve(source)
    assert set(hub.revisions) == {None}
    hub.revisions.clear()
    assert resolve(f"{source}@{revision}") == resolve(source, revision=revision) == expected
    assert set(hub.revisions) == {revision}
    assert len(hub.asked) == 3


@pytest.mark.parametrize("source", ["demo", "cached.safetensors", "."])
def test_only_the_hub_has_revisions(source: str, hub: Hub, weights: Path) -> None:
    with pytest.raises(ValueError, match=f"revision: '{COMMIT}' was given for {source}"):
        resolve(source, revision=COMMIT)
    with pytest.raises(ValueError, match=f"revision: '{COMMIT}' was given for {source}"):
        resolve(f"{source}@{COMMIT}")
    assert not hub.asked


def test_a_missing_revision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RevisionNotFoundError.__new__(RevisionNotFoundError, "404 Client Error")
    Hub(monkeypatch, error)
    with pytest.raises(FileNotFoundError, match=r"some/model/w\.pth at revision 'v9' is not on this machine"):
        resolve("some/model/w.pth@v9")
    Hub(monkeypatch, ConnectionError("offline"))
    with pytest.raises(RuntimeError, match=r"huggingface\.co/some/model/resolve/v9/w\.pth"):
        resolve("some/model/w.pth@v9")


@pytest.mark.parametrize("source", ["some/model/w.pth", "v2-vitl", "cached.safetensors", "."])
def test_a_digest_is_checked(source: str, hub: Hub, weights: Path) -> None:
    hub.path = weights
    for digest in (DIGEST, DIGEST.upper()):
        assert resolve(source, sha256=digest).samefile(weights)
        assert resolve(f"{source}#sha256={digest}").samefile(weights)
    for call in (lambda: resolve(source, sha256=WRONG), lambda: resolve(f"{source}#sha256={WRONG}")):
        with pytest.raises(
            ValueError, match=rf"cached\.safetensors: expected SHA-256 {WRONG}, found {DIGEST}"
        ):
            call()


def test_revision_and_digest_together(hub: Hub, weights: Path) -> None:
    hub.path = weights
    assert resolve(f"some/model/w.pth@{COMMIT}#sha256={DIGEST}") == weights
    assert hub.revisions == [COMMIT]
    with pytest.raises(ValueError, match="expected SHA-256"):
        resolve(f"some/model/w.pth@{COMMIT}#sha256={WRONG}")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("some/model/w.pth", {"sha256": "abc"}, "sha256: expected 64 hexadecimal digits, got 'abc'"),
        ("some/model/w.pth#sha256=", {}, "sha256: expected 64 hexadecimal digits, got ''"),
        ("some/model/w.pth", {"sha256": "x" * 64}, "sha256: expected 64 hexadecimal digits"),
        (
            f"some/model/w.pth#sha256={DIGEST}",
            {"sha256": WRONG},
            f"given twice, as '{WRONG}' and as '{DIGEST}'",
        ),
        ("some/model/w.pth@a", {"revision": "b"}, "revision: is given twice, as 'b' and as 'a'"),
        ("some/model/w.pth@", {}, "revision: is empty for some/model/w.pth"),
    ],
)
def test_bad_pins(source: str, options: dict[str, str], message: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(source, **options)
    assert not hub.asked


def test_a_file_whose_name_looks_like_a_pin_is_that_file(hub: Hub, tmp_path: Path) -> None:
    for name in ("w@v1.pth", "w.pth#sha256=abc"):
        (tmp_path / name).write_bytes(CONTENT)
        assert resolve(name) == Path(name)
    assert resolve(f"w@v1.pth#sha256={DIGEST}") == Path("w@v1.pth")


def test_from_pretrained_checks_revision_and_digest(hub: Hub) -> None:
    hub.path = resolve("demo")
    digest = hashlib.sha256(hub.path.read_bytes()).hexdigest()
    source = "some/model/w.safetensors"
    model = CATSeg.from_pretrained(source, ["a"], revision=COMMIT, sha256=digest, device="cpu")
    assert model.variant.name == "demo"
    assert hub.revisions == [COMMIT]
    with pytest.raises(ValueError, match=f"expected SHA-256 {WRONG}, found {digest}"):
        CATSeg.from_pretrained(source, ["a"], sha256=WRONG)


@pytest.mark.parametrize("source", ["pipe", "/dev/zero"])
def test_only_regular_files_are_weights(source: str, hub: Hub) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs FIFOs")
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=f"{source} is a (FIFO|device), not a regular file"):
        resolve(source)
    assert not hub.asked
