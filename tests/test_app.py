"""The page: its functions, its server, and what a visitor sees in a real browser."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.backend import why_no_triton
from catseg_fast.cli import main as cli
from catseg_fast.errors import RunError
from support.command_line import save_tiny_checkpoint
from support.tiny import CLASSES, tiny_model

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'catseg-fast[app]'")

from catseg_fast.app.page import OWN, Page, build_page, serve  # noqa: E402
from catseg_fast.app.viewer import heat_data, viewer_data  # noqa: E402
from catseg_fast.app.visitors import Kept  # noqa: E402
from catseg_fast.app.workbench import MAX_SIDE, Workbench, load_photo, read_names  # noqa: E402
from catseg_fast.cli.app import check_free  # noqa: E402

pytestmark = pytest.mark.xdist_group("app")

VISITOR = gradio.Request(session_hash="a")

STREET = Path(__file__).parent.parent / "examples" / "street.png"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model() -> CATSeg:
    return tiny_model("v2", max_classes=None)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 192 x 128 pixels."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    with Image.open(STREET) as street:
        street.resize((192, 128), Image.Resampling.BICUBIC).save(path)
    return path


def decode(uri: str) -> np.ndarray:
    with urlopen(uri) as response, Image.open(BytesIO(response.read())) as image:
        return np.array(image)


def test_the_viewer_shows_the_models_answer(model: CATSeg, photo: Path) -> None:
    loaded, answer, report = Workbench(model).segment(photo, CLASSES, sliding_window=False)
    expected = model.segment(photo, sliding_window=False)
    assert torch.equal(answer.labels, expected.labels)
    view = viewer_data(loaded.photo, answer)
    pixels = decode(view["labels"]).astype(int)
    ranks = pixels[..., 0] + 256 * pixels[..., 1]
    indices = np.array([entry["index"] for entry in view["classes"]])
    assert np.array_equal(indices[ranks], expected.labels.numpy())
    assert np.abs(pixels[..., 2] / 255 - expected.scores.numpy()).max() <= 0.5 / 255 + 1e-6
    assert sorted(indices.tolist()) == expected.labels.unique().tolist()
    for entry in view["classes"]:
        assert entry["name"] == CLASSES[entry["index"]]
        assert entry["share"] == pytest.approx((expected.labels == entry["index"]).double().mean().item())
    assert (view["width"], view["height"], view["total"]) == (192, 128, 5)
    assert min(report.aggregation, report.peak, report.held) >= 0


def test_more_than_255_classes_occur(photo: Path, model: CATSeg) -> None:
    labels = torch.arange(600).int().repeat(2, 1)
    answer = type(model.segment(photo, sliding_window=False))(
        labels, torch.full((2, 600), 0.5), tuple(f"class {index}" for index in range(700))
    )
    view = viewer_data(torch.zeros(3, 2, 600, dtype=torch.uint8), answer)
    pixels = decode(view["labels"]).astype(int)
    assert len(view["classes"]) == 600
    assert np.array_equal(pixels[0, :, 0] + 256 * pixels[0, :, 1], np.arange(600))


def test_the_picture_is_encoded_once(model: CATSeg, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = model.clip_model.encode_dense
    monkeypatch.setattr(
        model.clip_model, "encode_dense", lambda *args: (calls.append(len(args[0])), encode(*args))[1]
    )
    bench = Workbench(model)
    loaded, _, first = bench.segment(photo, CLASSES, sliding_window=False)
    assert first.encoding is not None
    assert first.text is not None
    _, answer, second = bench.segment(photo, ("sea", "road"), loaded, sliding_window=False, max_classes=1)
    assert (second.encoding, answer.classes, calls) == (None, ("sea", "road"), [1])
    assert second.text is not None
    _, _, third = bench.segment(photo, ("sea", "road"), loaded, backend="reference", sliding_window=False)
    assert (third.encoding, third.text, calls) == (None, None, [1])
    assert "reference" in third.plan
    bench.segment(photo, CLASSES, loaded, sliding_window=True)
    assert calls == [1, 5]


def test_the_plain_model_is_refused_where_memory_is_short(
    model: CATSeg, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 2**20

    monkeypatch.setattr("catseg_fast.app.workbench.psutil.virtual_memory", Memory)
    bench = Workbench(model)
    with pytest.raises(RunError, match=r"reference.*5 classes and 1 crops"):
        bench.segment(photo, CLASSES, backend="reference", sliding_window=False)


def test_only_back_ends_that_run_are_offered(model: CATSeg) -> None:
    expected = ["auto", "torch", "reference"]
    if why_no_triton(model.device) is None:
        expected.insert(1, "triton")
    assert Workbench(model).backends() == expected


def test_heat_is_the_score_map(model: CATSeg, photo: Path) -> None:
    loaded, answer, _ = Workbench(model).segment(photo, CLASSES, sliding_window=False)
    data = heat_data(loaded.photo, answer, 2)
    scores = answer.score_map(2)
    assert (data["name"], data["top"]) == ("sky", pytest.approx(scores.max().item()))
    brightness = decode(data["picture"]).astype(float).sum(axis=-1).ravel()
    assert np.corrcoef(brightness, scores.numpy().ravel())[0, 1] > 0.8


def test_pixels_with_a_low_score_are_shown_as_none(model: CATSeg, photo: Path) -> None:
    loaded, answer, _ = Workbench(model).segment(photo, CLASSES, sliding_window=False)
    page, least = Page(model), answer.scores.median().item()
    assert "classes" not in page.view(least, VISITOR)
    page.visitors.put("a", Kept(loaded, answer))
    everything = page.view(0, VISITOR)
    assert all(entry["colour"] for entry in everything["classes"])
    view = page.view(least, VISITOR)
    *classes, none = view["classes"]
    below = answer.scores < least
    assert (none["index"], none["name"], none["colour"]) == (-1, "none of these", None)
    assert none["share"] == below.double().mean().item() > 0
    assert sum(entry["share"] for entry in view["classes"]) == pytest.approx(1)
    packed = decode(view["labels"]).astype(int)
    assert np.array_equal(packed[..., 0] + 256 * packed[..., 1] == len(classes), below)


def test_classes_with_several_names_are_those_that_are_shown(model: CATSeg, photo: Path) -> None:
    page = Page(model)
    text, note = page.pick("pas-20b")
    assert text == "pas-20b"
    assert "MIT" in note
    view, picker, *_ = page.segment(str(photo), text, "auto", "all", "whole", 0, VISITOR)
    kept = page.visitors.get("a")
    assert kept is not None
    assert kept.segmentation.classes[-1] == "background"
    assert view["total"] == 21
    assert len(picker["choices"] if isinstance(picker, dict) else picker.choices) == 21
    page.score_map(20, VISITOR)
    page.segment(str(photo), "sky; tree", "auto", "all", "whole", 0, VISITOR)
    assert model.fold is None


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE), (10, 20, 30)).save(tmp_path / "large.png")
    reduced = load_photo(tmp_path / "large.png")
    assert reduced.shape == (3, MAX_SIDE // 2, MAX_SIDE)
    assert reduced[:, 5, 5].tolist() == [10, 20, 30]


def test_names_and_lists(model: CATSeg) -> None:
    assert read_names("sky\ntree; person, man\n") == ["sky", "tree", "person, man"]
    page = Page(model)
    text, note = page.pick("lvis-1203")
    assert len(read_names(text)) == 1203
    assert "CC BY 4.0" in note
    assert page.pick(OWN)[1] == ""


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (None, "sky", "Drop a picture"),
        ("PHOTO", " ; ", "no class names"),
        ("PHOTO", "sky; sky", "is listed twice"),
        ("none.png", "sky", "none.png"),
        ("PHOTO", "<b>; <b>", "&lt;b&gt;"),
    ],
)
def test_errors_are_messages(model: CATSeg, photo: Path, path: str | None, text: str, message: str) -> None:
    path = str(photo) if path == "PHOTO" else path
    with pytest.raises(gradio.Error) as caught:
        Page(model).segment(path, text, "auto", "all", "whole", 0, VISITOR)
    assert message in caught.value.message


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli.app, ["app", "--port", str(port)])
        assert result.exit_code == 1
        assert f"error: --port: {port} is taken on 127.0.0.1" in result.stderr
    check_free("127.0.0.1", port)
    with pytest.raises(RuntimeError, match="--host: cannot listen on"):
        check_free("203.0.113.1", port)


def test_the_command_serves_only_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = save_tiny_checkpoint(tmp_path)
    served = []
    monkeypatch.setattr("catseg_fast.app.page.serve", lambda *arguments: served.append(arguments[1:]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = CliRunner().invoke(cli.app, ["app", "--weights", str(weights), "--port", str(port)])
    assert result.exit_code == 0, result.stderr
    assert served == [("127.0.0.1", port, False)]


@pytest.fixture(scope="module")
def address(model: CATSeg) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build_page(model, untrained=True)
    yield serve(page, "127.0.0.1", port, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1440, 390])
def test_a_visitor(
    model: CATSeg, photo: Path, address: str, browser: Any, width: int, tmp_path: Path
) -> None:
    """Upload, type, segment, read the legend, point at a pixel, and look at a score map."""
    page = browser.new_page(viewport={"width": width, "height": 1000 if width > 1000 else 844})
    page.set_default_timeout(120_000)
    hosts, problems = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.set_input_files("#cf-image input[type=file]", photo)
    page.fill("#cf-classes textarea", "; ".join(CLASSES))
    page.locator("#cf-image img").wait_for()
    page.click("#cf-go")
    page.locator(".cf-item").first.wait_for()

    expected = model.segment(photo)
    shares = torch.bincount(expected.labels.flatten(), minlength=5).double() / expected.labels.numel()
    order = [index for index in shares.argsort(descending=True, stable=True).tolist() if shares[index] > 0]
    assert page.locator(".cf-item .cf-name").all_inner_texts() == [CLASSES[index] for index in order]
    assert page.locator(".cf-item .cf-share").all_inner_texts() == [
        f"{100 * shares[index]:.1f}%" for index in order
    ]
    assert page.locator(".cf-legend-head").inner_text().split() == f"{len(order)} of 5 classes occur".split()

    stage = page.locator(".cf-stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    for x, y in ((20, 10), (150, 90)):
        page.mouse.move(box["x"] + (x + 0.5) / 192 * box["width"], box["y"] + (y + 0.5) / 128 * box["height"])
        tip = page.locator(".cf-tip")
        assert tip.locator("b").inner_text() == CLASSES[expected.labels[y, x]]
        assert (
            tip.locator(".cf-share").inner_text() == f"{round(expected.scores[y, x].item() * 255) / 255:.2f}"
        )
    assert page.locator(".cf-tile").count() == 4
    page.screenshot(path=tmp_path / f"overlay-{width}.png")

    page.locator(".cf-item").nth(1).click()
    page.locator(".cf-heat img").wait_for()
    assert page.locator(".cf-heat img").get_attribute("alt") == f"Score map of {CLASSES[order[1]]}"
    page.screenshot(path=tmp_path / f"whole-{width}.png", full_page=True)

    page.fill("#cf-classes textarea", "sea; road")
    page.click("#cf-go")
    page.wait_for_function("document.querySelector('.cf-legend-head b').textContent.includes('of 2')")
    assert page.locator(".cf-tile b").first.inner_text() == "kept"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert (hosts - {""}, problems) == ({"127.0.0.1"}, [])
    page.close()
