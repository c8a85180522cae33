"""Class names to prompts, tokens and text features."""

from __future__ import annotations

from typing import Any

import open_clip
import open_clip.tokenizer
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catseg_fast.config import Version
from catseg_fast.reference.clip import DenseCLIP
from catseg_fast.text import tokens as tokens_module
from catseg_fast.text.class_lists import DATA_SET_LISTS, ready_list
from catseg_fast.text.features import encode_classes
from catseg_fast.text.fold import split_fold
from catseg_fast.text.prompts import (
    PROMPT_ENSEMBLES,
    check_classes,
    class_prompts,
    get_templates,
    synonyms,
)
from catseg_fast.text.tokens import tokenize, tokenize_classes
from support.golden_rule import fill
from support.tiny import TEMPLATES, V1, V2, tiny_model

VERSIONS: tuple[Version, ...] = ("v1", "v2")
versions = pytest.mark.parametrize("version", VERSIONS)
NAMES = ("sky", "building, edifice, house", "a,b", "traffic light, stop light", "very long grass by the road")


def clip_of(version: Version) -> DenseCLIP:
    clip = DenseCLIP((V1 if version == "v1" else V2).clip, version).eval()
    fill(clip, "sem_seg_head.predictor.clip_model.")
    return clip


@pytest.mark.parametrize(
    ("label", "v1", "v2"),
    [
        ("sky", ["sky"], ["sky"]),
        ("building, edifice", ["building", "edifice"], ["building"]),
        ("a, b, c", ["a", "b", "c"], ["a"]),
        ("a,b", ["a,b"], ["a,b"]),
        ("a,b, c", ["a,b", "c"], ["a,b"]),
        ("crt screen ,x", ["crt screen ,x"], ["crt screen ,x"]),
    ],
)
def test_synonyms(label: str, v1: list[str], v2: list[str]) -> None:
    assert synonyms(label, "v1") == v1
    assert synonyms(label, "v2") == v2


def test_prompts_are_ordered_by_template() -> None:
    templates = ["a {}.", "the {}!"]
    assert class_prompts("cat, kit", templates, "v1") == ["a cat.", "a kit.", "the cat!", "the kit!"]
    assert class_prompts("cat, kit", templates, "v2") == ["a cat.", "the cat!"]
    assert class_prompts("{}", ["a {}."], "v2") == ["a {}."]


def test_ensembles() -> None:
    assert {name: len(get_templates(name)) for name in PROMPT_ENSEMBLES} == PROMPT_ENSEMBLES
    assert PROMPT_ENSEMBLES == {"imagenet": 80, "imagenet_select": 8, "single": 1}
    assert get_templates("single") == ("A photo of a {} in the scene",)
    for templates in map(get_templates, PROMPT_ENSEMBLES):
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)
    assert get_templates(["x {}", "{} y"]) == ("x {}", "{} y")


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ("imagenet80", "'imagenet80' is not one of imagenet, imagenet_select, single"),
        ([], "there is no template"),
        (["a {}", "a photo"], "the template 'a photo' has no {}"),
    ],
)
def test_bad_ensembles(ensemble: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_ensemble: {message}"):
        get_templates(ensemble)
    with pytest.raises(ValueError, match=f"prompt_ensemble: {message}"):
        tiny_model(prompt_ensemble=ensemble or iter(()))


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "classes: the list is empty"),
        (["sky", "tree", "sky"], ValueError, r"classes: 'sky' is listed twice \(entries 0 and 2\)"),
        (["sky", ""], ValueError, "classes: entry 1 is blank"),
        (["sky", " \t"], ValueError, "classes: entry 1 is blank"),
        (["sky", 7], TypeError, "classes: entry 1 is 7, not a string"),
        (["sky", None], TypeError, "classes: entry 1 is None, not a string"),
        ("sky", TypeError, "classes: expected a list of names, got the string 'sky'"),
        (["sky", ", tree"], ValueError, "classes: entry 1, .*, has a blank synonym"),
        (["sky", "tree, "], ValueError, "classes: entry 1, .*, has a blank synonym"),
    ],
)
def test_bad_classes(classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_classes(classes)
    with pytest.raises(error, match=message):
        tiny_model(classes=classes)


def test_good_classes() -> None:
    assert check_classes(["sky", "Sky", "sky "]) == ("sky", "Sky", "sky ")
    assert check_classes(name for name in ("a", "b")) == ("a", "b")  # type: ignore[arg-type]
    assert check_classes(["ein Straßenschild", "猫", "🐈"]) == ("ein Straßenschild", "猫", "🐈")


# Words that a tokenizer may treat differently within a text than at its end or alone.
PIECES = (
    "cat", "Traffic_Light", "crème brûlée", "猫", "🐈", "ΑΣ", "\u017f", "ﬁ", "\u2019", "e\u0301", "10", "2.5",
    "'s", "'LL", "'", "''", ".", ",", ").", "(x)", "-", "_", "&", "&amp", "&amp;", "&#65", ";", "<",
    "<end_of_text>", "<start_of", "_text>", " ", "  ", "\t", "\n", "\r\n", "\x1b[1m", "\x00", "\x1f", "\x7f",
    "\xa0", "\u2028", "Ã©", "a", "s", "re", "x" * 30,
)  # fmt: skip


def test_tokens_are_open_clips() -> None:
    texts = ["a photo of a cat.", "", "  Two   Spaces &amp; more", "a,b", "猫 🐈 naïve", *PIECES]
    assert torch.equal(tokenize(texts), open_clip.tokenize(texts))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    texts=st.lists(
        st.one_of(
            st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
            st.text(st.characters(codec="ascii"), max_size=40),
            st.text(max_size=20),
        ),
        max_size=5,
    )
)
def test_tokens_are_open_clips_whatever_the_text(texts: list[str]) -> None:
    texts = [text for text in texts if len(open_clip.tokenizer._tokenizer.encode(text)) <= 75]
    assert torch.equal(tokenize(texts), open_clip.tokenize(texts))


@pytest.mark.parametrize("name", DATA_SET_LISTS)
def test_tokens_of_the_ready_lists_are_open_clips(name: str) -> None:
    """Every name in three templates, and some names in all templates."""
    templates, names = get_templates("imagenet"), split_fold(ready_list(name).classes)[0]
    for labels, chosen in ((names, (templates[0], templates[7], "{}")), (names[::97], templates)):
        ours = tokenize_classes(labels, chosen, "v1")
        for label, tokens in zip(labels, ours, strict=True):
            assert torch.equal(tokens, open_clip.tokenize(class_prompts(label, chosen, "v1"))), label


def test_tokenizing_cleans_no_plain_text_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check takes a third of a millisecond per prompt, and v1 has 80 prompts per class."""
    names, templates = ready_list("ade-150").classes, get_templates("imagenet")
    cleaned: list[str] = []
    tokenizer, clean = open_clip.tokenizer.SimpleTokenizer(), open_clip.tokenizer._clean_lower
    tokenizer.clean_fn = lambda text: cleaned.append(text) or clean(text)  # type: ignore[func-returns-value]
    monkeypatch.setattr(tokens_module, "_tokenizer", lambda: tokenizer)
    tokens_module._encode_word.cache_clear()
    texts = sum(map(len, tokenize_classes(names, templates, "v1")))
    assert texts == 26640
    assert len(cleaned) < 1500
    assert not any(" " in text for text in cleaned)


def test_a_long_name_is_an_error_with_its_name() -> None:
    longest = "x " * 75
    assert (tokenize([longest])[0] != 0).all()
    with pytest.raises(ValueError, match=r"has 78 tokens, more than CLIP's 77"):
        tokenize([longest + "x"])
    label = "sign " * 70 + "post"  # fits by itself, but not in every template
    tokenize([label])
    with pytest.raises(ValueError, match=f"classes: '{label}' does not fit: the text .* more than CLIP's 77"):
        tokenize_classes(["sky", label], ["{}", "a photo of a {} in the scene"], "v2")
    with pytest.raises(ValueError, match=f"classes: '{label}' does not fit"):
        tiny_model(classes=["sky", label])


def test_only_the_first_synonym_must_fit_in_v2() -> None:
    label = "tree, " + "very " * 100
    assert len(tokenize_classes([label], ["{}"], "v2")[0]) == 1
    with pytest.raises(ValueError, match="classes: 'tree, very very"):
        tokenize_classes([label], ["{}"], "v1")


def slow_features(clip: DenseCLIP, label: str, templates: tuple[str, ...], version: Version) -> Tensor:
    """Return `[P, C]`, computed one text at a time at full length."""
    names = label.split(", ") if version == "v1" else [label.split(", ")[0]]
    rows = []
    for template in templates:
        units = [F.normalize(clip.encode_text(tokenize([template.format(name)]))[0], dim=0) for name in names]
        rows.append(F.normalize(sum(units) / len(units), dim=0) if len(units) > 1 else units[0])
    return torch.stack(rows)


@versions
@torch.no_grad()
def test_encoding_is_that_of_each_text_alone(version: Version) -> None:
    clip = clip_of(version)
    tokens = tokenize_classes(NAMES, TEMPLATES, version)
    features = encode_classes(clip, tokens, len(TEMPLATES))
    assert features.shape == (len(NAMES), len(TEMPLATES), 32)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:2]))
    for label, row in zip(NAMES, features, strict=True):
        torch.testing.assert_close(row, slow_features(clip, label, TEMPLATES, version), rtol=0, atol=2e-6)
    assert (features[1] - features[0]).abs().max() > 0.01
    edifice = encode_classes(clip, tokenize_classes(["building"], TEMPLATES, version), len(TEMPLATES))
    assert torch.allclose(edifice[0], features[1], atol=1e-5) == (version == "v2")


@versions
@torch.no_grad()
def test_batch_size_does_not_matter(version: Version) -> None:
    clip = clip_of(version)
    tokens = tokenize_classes(NAMES, TEMPLATES, version)
    total = sum(map(len, tokens))
    whole = encode_classes(clip, tokens, len(TEMPLATES))
    for batch_size in (1, 3, total, total + 1):
        seen: list[tuple[int, int]] = []
        settings: Any = {"batch_size": batch_size, "progress": lambda *now, seen=seen: seen.append(now)}
        features = encode_classes(clip, tokens, len(TEMPLATES), **settings)
        torch.testing.assert_close(features, whole, rtol=0, atol=2e-6)
        steps = [*range(batch_size, total, batch_size), total]
        assert seen == [(step, total) for step in steps]


def test_the_model_reports_progress() -> None:
    model = tiny_model("v1")
    seen: list[tuple[int, int]] = []
    model.text_features(lambda *now: seen.append(now))
    assert seen == [(12, 12)]  # five classes, one with two names, of two prompts
    model.text_features(lambda *now: seen.append(now))
    assert len(seen) == 1  # kept


def test_one_class_and_one_prompt() -> None:
    features = tiny_model("v2", ["sky"]).text_features()
    assert features.shape == (1, 1, 32)
    torch.testing.assert_close(features.norm(), torch.ones(()))
