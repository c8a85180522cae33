"""`CATSeg.warmup` and `catseg-fast warmup`: afterwards, first calls do not wait."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from catseg_fast import CATSeg
from catseg_fast.cli.main import app
from catseg_fast.cli.warmup import parse_sizes
from catseg_fast.files import user_cache
from support.tiny import picture, tiny_model


def test_text_features_and_calls_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("v2", [f"thing {index}" for index in range(40)])
    seen: list[tuple[int, ...]] = []
    segment = CATSeg.segment

    def noted(self: CATSeg, image, **options):  # type: ignore[no-untyped-def]
        seen.append((*image.shape, options["sliding_window"]))
        return segment(self, image, **options)

    monkeypatch.setattr(CATSeg, "segment", noted)
    model.warmup([(48, 64), (30, 30)], sliding_window=False)
    assert seen == [(3, 48, 64, False), (3, 30, 30, False)]
    assert list((user_cache() / "text-features").rglob("*.safetensors"))
    monkeypatch.setattr(model.text_encoder, "encode", None)  # is not asked again
    model.segment(picture(48, 64), sliding_window=False)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "there are none"),
        ([(0, 5)], "0 is not positive"),
        ([(5, -1)], "-1 is not positive"),
    ],
)
def test_bad_sizes(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"sizes: {message}"):
        tiny_model().warmup(sizes)


def test_the_command_line_names_the_folders_to_copy() -> None:
    result = CliRunner().invoke(app, ["warmup", "--size", "32x40", "--whole", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "text features" in result.output
    assert str(user_cache()) in result.output


def test_no_text_features_are_kept_on_request() -> None:
    arguments = ["warmup", "--size", "32x40", "--whole", "--device", "cpu", "--classes-list", "ade-150"]
    result = CliRunner().invoke(app, [*arguments, "--no-text-cache"])
    assert result.exit_code == 0, result.output
    assert not list((user_cache() / "text-features").rglob("*.safetensors"))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert list((user_cache() / "text-features").rglob("*.safetensors"))


@pytest.mark.parametrize("size", ["480", "0x5", "4x", "axb", "-1x5", "1x2x3"])
def test_a_bad_size_is_named(size: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["warmup", "--size", size])
    assert result.exit_code == 2
    assert "is not HxW" in result.output


def test_sizes() -> None:
    assert parse_sizes(["480x640", "1080X1920"]) == [(480, 640), (1080, 1920)]
