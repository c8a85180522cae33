"""CUDA graphs: without a GPU, a tape that replays torch's operations takes their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from catseg_fast import CATSeg, Segmentation
from catseg_fast.engine import schedule
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.recording import Recorder
from catseg_fast.inference.graphs import ModelGraphs
from catseg_fast.reference.window_attention import shifted_window_mask
from support.tiny import CLASSES, agree, close, picture, tiny_model

SIZE = (64, 96)


class Tape(TorchDispatchMode):
    """A mode that records each operation with its tensors, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.notes.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run each operation again on the same tensors, and write results to the same memory."""
        for op, args, kwargs, out in self.notes:
            again = op(*args, **kwargs)
            aliased = any(x.alias_info is not None for x in op._schema.returns)
            if not aliased:
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def record_on_tape(run: Callable[[], Any]) -> Callable[[], Any]:
    run()
    with Tape() as tape:
        answer = run()

    def replay() -> Any:
        tape.replay()
        return answer

    return replay


def recorded(model: CATSeg, *sizes: tuple[int, int], **options: Any) -> ModelGraphs:
    return ModelGraphs(model, sizes or (SIZE,), record_on_tape, **options)


@pytest.mark.parametrize(("version", "sliding_window"), [("v1", False), ("v2", False), ("v2", True)])
def test_a_replay_is_the_call(version: Any, sliding_window: bool) -> None:
    model = tiny_model(version, CLASSES[:2])
    graphs = recorded(model, sliding_window=sliding_window)
    for name in ("first", "second"):
        image = picture(*SIZE, name)
        answer = graphs(image)
        assert isinstance(answer, Segmentation)
        assert agree(answer, model.segment(image, sliding_window=sliding_window, top_k=2), 1e-6)


def test_probabilities_are_the_callers_own() -> None:
    model = tiny_model(classes=CLASSES[:2])
    graphs = recorded(model, probabilities=True)
    first, second = (graphs(picture(*SIZE, name)) for name in ("first", "second"))
    for name, maps in (("first", first), ("second", second)):
        (expected,) = model([{"image": picture(*SIZE, name), "height": SIZE[0], "width": SIZE[1]}])
        assert isinstance(maps, Tensor)
        assert close(maps, expected["sem_seg"], 1e-6)


def record_nothing(run: Callable[[], Any]) -> Callable[[], Any]:
    """A recorder for tests of the code around a recording; each replay is a call."""
    return run


@pytest.fixture(scope="module")
def shared() -> CATSeg:
    return tiny_model(classes=CLASSES[:2], sliding_window=False)


def test_each_size_has_its_recording(shared: CATSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Callable[[], Any]) -> Callable[[], Any]:
        with monkeypatch.context() as patch:  # while a graph is recorded, memory cannot be asked for
            patch.setattr(schedule, "free_bytes", lambda _: pytest.fail("free memory was asked for"))
            run()
        return run

    graphs = ModelGraphs(shared, [SIZE, (40, 40)], record)
    assert graphs.sizes == [SIZE, (40, 40)]
    with pytest.raises(ValueError, match=r"image: its size \(40, 41\) was not recorded; .*\(40, 40\)"):
        graphs(picture(40, 41))


CHANGES: dict[str, Callable[[CATSeg], object]] = {
    "classes": lambda model: model.set_classes(["sand", "sea"]),
    "weights": lambda model: model.aggregator.head.bias.add_(1),
    "precision": lambda model: setattr(model.engine, "precision", torch.bfloat16),
    "backend": lambda model: setattr(model, "backend", "torch"),
    "max_classes": lambda model: setattr(model, "max_classes", None),
    "training mode": lambda model: model.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_ends_the_recording(name: str) -> None:
    model = tiny_model(classes=CLASSES[:2], sliding_window=False)
    graphs = ModelGraphs(model, [SIZE], record_nothing)
    graphs(picture(*SIZE))
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match=f"cuda_graph: .*{name}.* changed since the recording"):
        graphs(picture(*SIZE))


def test_what_is_not_a_number_is_computed_again(shared: CATSeg) -> None:
    def record_nan(run: Callable[[], Any]) -> Callable[[], Any]:
        def replay() -> Any:
            answer = run()
            answer.scores[0, 0] = torch.nan
            return answer

        return replay

    answer = ModelGraphs(shared, [SIZE], record_nan)(picture(*SIZE))
    expected = shared.segment(picture(*SIZE))
    assert isinstance(answer, type(expected))
    assert torch.equal(answer.scores, expected.scores)


def test_what_cannot_be_recorded(shared: CATSeg) -> None:
    for sizes in ([], [(0, 3)]):
        with pytest.raises(ValueError, match="sizes: "):
            ModelGraphs(shared, sizes, record_nothing)
    with pytest.raises(ValueError, match="training mode"):
        ModelGraphs(tiny_model(classes=CLASSES).train(), [SIZE], record_nothing)
    shared.engine.policy = "offload"
    with pytest.raises(RuntimeError, match="copies to the host are not recorded"):
        ModelGraphs(shared, [SIZE], record_nothing)
    shared.engine.policy = None


def test_without_a_gpu_the_reason_is_said(shared: CATSeg) -> None:
    with pytest.raises(RuntimeError, match="cuda_graph: needs a CUDA GPU; the model is on 'cpu', with torch"):
        shared.cuda_graph([SIZE])


class NoCopies(TorchDispatchMode):
    """A mode that fails if a value goes between host and device, with "meta" as the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}  # numbers come as tensors of the host
        if len(devices) > 1 or op is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(f"{op} copies between {devices}")
        return out


def test_selected_classes_are_recorded() -> None:
    model = tiny_model(classes=CLASSES, max_classes=2)
    graphs = ModelGraphs(model, [SIZE], record_nothing)
    for name in ("first", "second"):  # another picture may have other best classes
        answer, expected = graphs(picture(*SIZE, name)), model.segment(picture(*SIZE, name))
        assert isinstance(answer, type(expected))
        assert torch.equal(answer.labels, expected.labels)


@torch.no_grad()
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nothing_is_copied_between_host_and_device(
    version: Any, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no "meta"
    monkeypatch.setattr(Engine, "_without_autocast", lambda _: nullcontext())
    model = tiny_model(version, CLASSES[:2]).to("meta")
    model.backend, model.max_classes = "torch", limit
    text = tree_map_only(Tensor, lambda x: x.to("meta"), tiny_model(version, CLASSES[:2]).text_features())
    model.text_features = lambda progress=None: text  # type: ignore[method-assign]
    graphs = ModelGraphs.__new__(ModelGraphs)
    graphs.model, graphs.sliding_window, graphs.probabilities = model, True, False
    model.engine.policy, model.engine.chunk, model.engine.memory_budget = "resident", 2, 2**60
    model.vocabulary_terms()
    with NoCopies():
        answer = graphs._read_out(torch.zeros(3, *SIZE, device="meta"))
    assert answer.labels.is_meta


def test_a_mask_by_comparisons() -> None:
    mask = shifted_window_mask((8, 4), 4, 2)
    row = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]).view(2, 4, 1).expand(2, 4, 4)
    region = (row * 3 + torch.tensor([1, 1, 2, 2])).flatten(1)
    assert torch.equal(mask, (region[:, :, None] != region[:, None, :]).float() * -100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("sliding_window", [True, False])
def test_on_a_gpu(version: Any, backend: str, sliding_window: bool) -> None:
    model = tiny_model(version).to("cuda")
    model.backend = backend
    graphs = model.cuda_graph([SIZE, (40, 40)], sliding_window=sliding_window)
    for size in (SIZE, (40, 40), SIZE):
        for name in ("first", "second"):
            image = picture(*size, name)
            answer, expected = graphs(image), model.segment(image, sliding_window=sliding_window)
            assert isinstance(answer, type(expected))
            assert close(answer.scores, expected.scores, 1e-3)
            assert (answer.labels == expected.labels).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_recording_of_anything() -> None:
    x = torch.ones(3, device="cuda")
    replay = Recorder(x.device)(lambda: 2 * x)
    x.fill_(5)
    assert replay().tolist() == [10, 10, 10]
