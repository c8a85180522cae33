"""Text features that are kept on disk: they are found again, never wrong, and never cause a failure."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from catseg_fast import CATSeg
from catseg_fast.config import Version
from catseg_fast.files import user_cache
from catseg_fast.text import features, features_cache
from catseg_fast.text.features_cache import FeaturesCache
from catseg_fast.text.tokens import tokenize
from catseg_fast.weights import weights_hash
from support.command_line import run
from support.text_tower import NAMES, count_texts
from support.tiny import TEMPLATES, tiny_model

TEXTS = 2 * 41  # of NAMES in v1, whose synonyms are texts of their own


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts in each call of a text tower."""
    return count_texts(monkeypatch)


def text_features(classes: Sequence[str] = NAMES, version: Version = "v1", **kwargs: Any) -> Tensor:
    """Return features of some classes from a new model."""
    return tiny_model(version, classes, **kwargs).text_features()


def files(folder: Path | None = None) -> list[Path]:
    folder = folder or user_cache() / "text-features"
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_second_model_encodes_nothing(version: Version, encoded: list[int]) -> None:
    first = text_features(version=version)
    assert sum(encoded) == (TEXTS if version == "v1" else len(NAMES))
    del encoded[:]
    second = text_features(version=version)
    assert not encoded
    assert torch.equal(first, second)
    assert torch.equal(first, text_features(version=version, text_cache=False))
    assert not second.is_inference()


def test_a_changed_list_encodes_only_new_classes(encoded: list[int]) -> None:
    first = text_features()
    del encoded[:]
    changed = text_features(("new", *reversed(NAMES[5:]), "newer, newest"))
    assert sum(encoded) == 2 * 3
    assert torch.equal(changed[1:-1], first[5:].flip(0))
    del encoded[:]
    assert torch.equal(text_features(("newer, newest", *NAMES, "new"))[[0, -1]], changed[[-1, 0]])
    assert not encoded


def test_classes_with_equal_tokens_are_encoded_once(encoded: list[int]) -> None:
    found = text_features((*NAMES, "Sky", "SKY "))
    assert sum(encoded) == TEXTS
    assert torch.equal(found[-1], found[-3])


def test_other_weights_templates_and_types_are_not_found(encoded: list[int]) -> None:
    text_features()
    models = [
        tiny_model("v1", NAMES, prompt_ensemble=("a {}.", TEMPLATES[1])),
        tiny_model("v1", NAMES, prompt_ensemble=(*TEMPLATES, *TEMPLATES)),
        tiny_model("v1", NAMES).double(),
        *(tiny_model("v1", NAMES) for _ in range(3)),
    ]
    with torch.no_grad():
        models[-1].clip_model.token_embedding.weight[-1, 0] += 1e-3  # of no text here
        block = models[-2].clip_model.transformer.resblocks[0].mlp.c_fc
        block.weight[[0, 1]] = block.weight[[1, 0]]
    models[-3].clip_model.config = None  # type: ignore[assignment]  # heads, activation
    for model in models:
        del encoded[:]
        model.text_features()
        assert sum(encoded) >= TEXTS


def test_the_same_texts_as_synonyms_are_something_else() -> None:
    """Four texts are two prompts of two synonyms, or four prompts of one name."""
    model = tiny_model("v1", None)
    tokens = [tokenize([f"{name} {index}" for name in ("a c", "b c", "a d", "b d")]) for index in range(9)]
    for prompts in (2, 4):
        found = model.text_encoder.encode(model.clip_model, tokens, prompts, torch.float32)
        assert found.shape == (9, prompts, 32)


def test_few_texts_are_not_worth_hashing_the_weights(
    encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def counted(named: Mapping[str, Tensor]) -> str:
        hashed.append(len(named))
        return weights_hash(named)

    monkeypatch.setattr(features, "weights_hash", counted)
    model = tiny_model("v1", NAMES[:10])
    model.text_features()
    assert not hashed
    assert not files()
    model.set_classes(NAMES)
    model.text_features()
    model.set_classes(("one more", *NAMES[:10]))  # the hash is known now
    del encoded[:]
    model.text_features()
    assert len(hashed) == 1
    assert sum(encoded) == 2


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def damage_other_file(path: Path) -> None:
    path.write_text("not safetensors")


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_empty, damage_zeros, damage_one_bit, damage_other_file]
)
def test_a_broken_file_is_named_and_replaced(damage: Any, encoded: list[int]) -> None:
    first = text_features()
    (path,) = files()
    damage(path)
    del encoded[:]
    with pytest.warns(UserWarning, match=f"{path}: broken, not used: ") as warned:
        second = text_features()
    assert len(warned) == 1
    assert sum(encoded) == TEXTS
    assert torch.equal(first, second)
    del encoded[:]
    assert torch.equal(text_features(), first)
    assert not encoded


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    first = text_features(text_cache=False)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "below"):
        with pytest.warns(UserWarning, match=f"{folder}: text features cannot be kept there: ") as warned:
            assert torch.equal(text_features(text_cache=folder), first)
        assert len(warned) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("IoError")])
def test_a_full_disk_leaves_nothing_behind(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(features_cache, "save_file", save)
    with pytest.warns(UserWarning, match=f"{tmp_path}: text features .* there: {re.escape(str(error))}"):
        assert text_features(text_cache=tmp_path).isfinite().all()
    assert not files(tmp_path)


def test_a_cache_that_can_only_be_read_serves(
    encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text_features(text_cache=tmp_path)
    del encoded[:]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(text_features(text_cache=tmp_path), first)
    assert not encoded


def test_off_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "weights_hash", None)  # nothing is hashed, either
    text_features(text_cache=False)
    assert not files()
    with pytest.raises(TypeError, match=r"text_cache: expected True, False, a folder or .*, not 7"):
        tiny_model(text_cache=7)
    with pytest.raises(ValueError, match="limit: 0 bytes are not positive"):
        FeaturesCache(limit=0)


def test_nan_is_not_kept() -> None:
    model = tiny_model("v1", NAMES)
    with torch.no_grad():
        model.clip_model.text_projection.fill_(float("nan"))
    assert model.text_features().isnan().all()
    assert not files()


def test_what_was_not_used_for_longest_goes(tmp_path: Path, encoded: list[int]) -> None:
    lists = [[f"{letter}{index}" for index in range(20)] for letter in "abc"]
    text_features(lists[0], text_cache=tmp_path)
    limit = int(files(tmp_path)[0].stat().st_size * 2.5)

    def use(names: list[str]) -> int:
        del encoded[:]
        text_features(names, text_cache=FeaturesCache(tmp_path, limit))
        now = time.time_ns()
        for age, path in enumerate(sorted(files(tmp_path), key=lambda path: -path.stat().st_mtime_ns)):
            os.utime(path, ns=(now, now - (age + 1) * 10**9))  # different even if the clock is coarse
        return sum(encoded)

    assert use(lists[1]) == 40
    assert use(lists[0]) == 0
    assert use(lists[2]) == 40
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert use(lists[0]) == 0
    assert use(lists[1]) == 40  # which was the oldest


def test_a_vocabulary_larger_than_the_limit_keeps_what_fits(
    tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "TEXTS_PER_FILE", 20)
    cache = FeaturesCache(tmp_path, 10_000)
    with pytest.warns(UserWarning, match=f"{tmp_path}: .* do not fit in the cache's limit") as warned:
        first = text_features(text_cache=cache)
    assert len(warned) == 1
    kept = files(tmp_path)
    assert 0 < sum(path.stat().st_size for path in kept) <= 10_000
    del encoded[:]
    with pytest.warns(UserWarning, match="do not fit"):
        assert torch.equal(text_features(text_cache=cache), first)
    assert 0 < sum(encoded) < TEXTS
    assert files(tmp_path) == kept  # nothing is written and removed in turn


def test_many_small_files_become_one(
    tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_cache, "SMALL_FILES", 4)
    model = tiny_model("v1", NAMES, text_cache=tmp_path)
    model.text_features()
    for index in range(8):
        model.set_classes((*NAMES, f"new {index}"))
        model.text_features()
        assert len(files(tmp_path)) <= 4
    del encoded[:]
    text_features((*NAMES, *(f"new {index}" for index in range(8))), text_cache=tmp_path)
    assert not encoded


def test_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights, nearby = tmp_path / "model" / "weights.safetensors", tmp_path / f"{'a' * 32}.safetensors"
    for path in (weights, nearby):
        path.write_bytes(bytes(10**5))
    text_features(text_cache=FeaturesCache(tmp_path, 30_000))
    text_features([f"other {index}" for index in range(40)], text_cache=FeaturesCache(tmp_path, 30_000))
    assert weights.stat().st_size == nearby.stat().st_size == 10**5
    (ours,) = (path for path in files(tmp_path) if path not in (weights, nearby))

    left = ours.with_name(f".{ours.name}.123.tmp")
    left.write_text("of a process that was killed")
    text_features([f"again {index}" for index in range(40)], text_cache=tmp_path)
    assert left.exists()  # it may still run
    os.utime(left, (0, 0))
    text_features([f"last {index}" for index in range(40)], text_cache=tmp_path)
    assert not left.exists()


def test_an_interrupted_encoding_goes_on_where_it_was(
    encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "TEXTS_PER_FILE", 20)
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_model("v1", NAMES).text_features(interrupt)
    assert seen == [(20, TEXTS), (40, TEXTS), (60, TEXTS)]
    del encoded[:]
    text_features()
    assert sum(encoded) == TEXTS - 40


def test_cached_entries_are_those_of_the_file() -> None:
    """Files are plain safetensors: [P, C] by class."""
    first = text_features()
    entries = load_file(files()[0])
    assert len(entries) == len(NAMES)
    assert {x.shape for x in entries.values()} == {(2, 32)}
    assert any(torch.equal(x, first[-1]) for x in entries.values())


def test_a_model_on_the_meta_device_has_no_weights_to_hash() -> None:
    model = CATSeg(tiny_model("v1", None).variant, None, prompt_ensemble=TEMPLATES)
    assert not model.text_encoder._worth_caching(model.to("meta").clip_model, [torch.zeros(10**6, 77)])


@pytest.mark.parametrize(("flags", "kept"), [([], 1), (["--no-text-cache"], 0)])
def test_the_command_line_has_a_switch(flags: list[str], kept: int, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), "green").save(picture)
    names = "; ".join(NAMES)
    command = ["segment", str(picture), "--classes", names, "--output", str(tmp_path / "out"), "--whole"]
    result = run(*command, "--device", "cpu", *flags)
    assert result.exit_code == 0, result.output
    assert len(files()) == kept
