"""One process of a split model: its share, merged maps, refusals, and the size of its messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from catseg_fast.engine.class_parallel import ClassShare, RankError
from catseg_fast.engine.engine import Engine
from catseg_fast.inference.readout import LabelMap, TopClasses
from support.aggregators import features, make_aggregator
from support.process_group import single_process_group
from support.tiny import picture, tiny_model

ROOT = Path(__file__).parent.parent


NAMES = ("wall", "building, edifice", "sky", "floor", "tree", "car", "cat", "dog", "road", "lamp", "sea")


IMAGE, OTHER = picture(40, 30), picture(26, 34, "other")


pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.xdist_group("processes"),
]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Process group of this process only."""
    with single_process_group(tmp_path):
        yield


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_even_and_in_order(classes: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    share = ClassShare(tuple(map(str, range(classes))))
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    held, sizes = [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        held += share.classes[share.own]
        sizes.append(share.own.stop - share.own.start)
    assert tuple(held) == share.classes
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("alone")
def test_ranks_are_merged_as_one_map_with_ties_and_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, the second without a class."""
    maps = torch.rand(9, 5, 7, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)
    maps[3, 0, 0] = maps[4, 0, 0] = -torch.tensor(torch.nan)
    maps[:, 1, 1] = 0
    names, bounds = tuple(map(str, range(9))), [(0, 4), (4, 4), (4, 9)]

    def merge(count: int, new: Callable[[], Any]) -> list[Any]:
        """Return the merged targets. Ranks take turns: a reduction needs the values of all."""
        rounds: list[Tensor] = []
        while True:
            targets: list[Any] = []
            asked: list[Tensor] = []
            for start, stop in bounds:
                target, seen = new(), iter(range(count))
                if start < stop:
                    target.update(start, maps[start:stop])

                def reduce(
                    _: ClassShare, keys: Tensor, operation: Any, seen: Any = seen, asked: Any = asked
                ) -> None:
                    turn = next(seen)
                    if turn < len(rounds):
                        keys.copy_(rounds[turn])
                    elif turn == len(rounds):
                        asked.append(keys.clone())

                monkeypatch.setattr(ClassShare, "own", slice(start, stop))
                monkeypatch.setattr(ClassShare, "_reduce", reduce)
                ClassShare(names).merge(target, count)
                targets.append(target)
            if len(rounds) == count:
                return targets
            rounds.append(torch.stack(asked).amax(dim=0))

    size, device = (5, 7), torch.device("cpu")
    whole, best = LabelMap(size, device), TopClasses(4, size, device)
    for target in (whole, best):
        target.update(0, maps)
    for merged in merge(1, lambda: LabelMap(size, device)):
        assert torch.equal(merged.labels, whole.labels)
        torch.testing.assert_close(merged.scores, whole.scores, rtol=0, atol=0, equal_nan=True)
    for merged in merge(4, lambda: TopClasses(4, size, device)):
        assert torch.equal(merged.labels, best.labels)
        torch.testing.assert_close(merged.scores, best.scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("alone")
def test_what_a_split_model_refuses() -> None:
    model = tiny_model("v2", NAMES, sliding_window=False)
    model.split_classes()
    assert "ranks      1; rank 0, this one, has 11 of the classes" in model.explain()
    with pytest.raises(RuntimeError, match=r"no rank has all classes; call segment\(\) or label_map\(\)"):
        model([{"image": IMAGE}])
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.set_classes(NAMES, training=True)
    with pytest.raises(ValueError, match="is listed twice"):
        model.set_classes(["sky", "sky"])
    assert model.classes == NAMES
    with pytest.raises(RuntimeError, match="no rank has all logits"):
        model.engine.logits(torch.zeros(1, 32, 24, 24), torch.zeros(1, 3, 1, 32), [None] * 3, None)
    with pytest.raises(RuntimeError, match="segment with keep_logits=False"):
        model.segment(IMAGE, keep_logits=True)
    with pytest.raises(ValueError, match="top_k: 0 is not positive"):
        model.segment(IMAGE, top_k=0)
    model.backend = "reference"
    with pytest.raises(RankError, match="the back end 'reference' takes all classes at once"):
        model.segment(IMAGE)


@pytest.mark.usefixtures("alone")
def test_softmax_attention_is_refused() -> None:
    aggregator = make_aggregator(attention_type="full")
    img_feats, text_feats, guidance = features(aggregator, 3)
    engine = Engine(aggregator)
    engine.share = ClassShare(NAMES[:3])
    vocabulary = engine.vocabulary(text_feats[:1], None)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_type 'full' needs the key and value"):
        engine.stream(img_feats, vocabulary, guidance, None, lambda: lambda classes, logits: None)
    with pytest.raises(RuntimeError, match="no gradients pass between ranks"):
        engine.stream(img_feats, vocabulary, guidance, None, lambda: lambda classes, logits: None)


@pytest.mark.usefixtures("alone")
def test_what_is_exchanged_does_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce, sent = ClassShare._reduce, list[int]()

    def counted(self: ClassShare, tensor: Tensor, operation: Any) -> None:
        sent.append(tensor.nbytes)
        reduce(self, tensor, operation)

    monkeypatch.setattr(ClassShare, "_reduce", counted)
    model = tiny_model("v2", NAMES, sliding_window=False, max_classes=None)
    model.split_classes()
    for classes in (NAMES, NAMES[:3]):
        model.set_classes(classes)
        sent.clear()
        model.segment(IMAGE)
        *sums, label_map = (size for size in sent if size != 16)  # checks that all make the same call
        assert len(sent) == len(sums) + 3
        assert sums == [576 * 4 * 8 * 8 * 4, 576 * 4 * 8 * 4] * 2  # two layers, 4 heads of 8 channels
        assert label_map == 8 * 40 * 30


def test_the_notes_figures_are_those_of_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    note = (ROOT / "docs" / "class_parallel.md").read_text(encoding="utf-8")
    (formula,) = re.findall(r"^```python\n(from math.*?)^```$", note, flags=re.MULTILINE | re.DOTALL)
    exec(compile(formula, "class_parallel.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert [line for line in note.splitlines() if re.match(r"\| \w+ x \d+ \|", line)] == printed
