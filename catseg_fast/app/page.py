"""The page of `catseg-fast app`, in Gradio: its components and their events."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import OutOfMemoryError

from catseg_fast._version import __version__
from catseg_fast.app.viewer import heat_data, report_html, viewer_data
from catseg_fast.app.workbench import Loaded, Workbench, read_names
from catseg_fast.console import stdout
from catseg_fast.data.scenes import draw_scene
from catseg_fast.data.scenes.words import HELD_OUT
from catseg_fast.errors import CATSegError
from catseg_fast.inference.segmentation import Segmentation
from catseg_fast.model import CATSeg
from catseg_fast.text.class_lists import DATA_SET_LISTS, ready_list, separator_notes

OWN = "own names"
VISITOR_ERRORS = (CATSegError, OSError, MemoryError, OutOfMemoryError)  # shown; others are bugs, and logged
HOUR = 3600  # seconds that a visitor's picture is kept
_EXAMPLE = (7, 10)  # seed of the first picture
_BUNDLED = (
    "The weights in this package know generated scenes only, such as the one below. For your own pictures, "
    "start the page with --weights v2-vitl."
)
_FOLDER = Path(__file__).parent / "static"
_FONTS = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
_MONOSPACE = ["ui-monospace", "SF Mono", "Consolas", "DejaVu Sans Mono", "monospace"]


class Page:
    """Handlers of the page's events.

    A visitor's state is the encoded picture and the last segmentation. If vocabulary, back end or max_classes
    change, the picture is not encoded again.
    """

    def __init__(self, model: CATSeg) -> None:
        self.bench = Workbench(model)

    def pick(self, name: str) -> tuple[Any, str]:
        """Return a ready list for the text box (its names, or the list's name), and its source."""
        if name == OWN:
            return gr.skip(), ""
        entry = ready_list(name)
        about = f"{escape(entry.about)}. {escape(entry.licence)}. <a href='{escape(entry.source)}' "
        # Classes with several names each are named by their list only.
        text = name if isinstance(entry.classes, dict) else "; ".join(entry.classes)
        return text, about + "target='_blank' rel='noopener'>Source</a>"

    def segment(
        self,
        state: tuple[Loaded, Segmentation] | None,
        path: str | None,
        text: str,
        backend: str,
        limit: str,
        sliding: str,
        min_score: float = 0.0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Return the new state, the viewer's value, the choice of classes, no score map, and the report."""
        if path is None:
            raise gr.Error("Drop a picture first.", print_exception=False)
        try:
            names = read_names(text)
            for note in separator_notes(names):
                gr.Info(escape(note))
            progress(0, desc="Segmenting")
            loaded, segmentation, report = self.bench.segment(
                path,
                names,
                state and state[0],
                backend=backend,
                max_classes=None if limit == "all" else int(limit),
                sliding_window=sliding == "crops",
                progress=lambda done, total: progress((done, total), desc="Class names"),
            )
        except VISITOR_ERRORS as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error
        state = (loaded, segmentation)
        classes, view = segmentation.classes, self.view(state, min_score)
        found = [entry["index"] for entry in view["classes"] if entry["colour"]]
        rest = sorted(set(range(len(classes))) - set(found))
        choices = [(classes[index], index) for index in (*found, *rest)]
        picker = gr.Dropdown(choices=choices, value=None, visible=True)
        return state, view, picker, None, report_html(report)

    def view(self, state: tuple[Loaded, Segmentation] | None, min_score: float) -> Any:
        """Return the viewer's value, in which pixels whose best class has a lower score have no class."""
        if state is None:
            return None
        loaded, segmentation = state
        return viewer_data(loaded.photo, segmentation.with_min_score(min_score or None))

    def score_map(self, state: tuple[Loaded, Segmentation] | None, index: int | None) -> Any:
        """Return the value of the score map's viewer for a class."""
        if state is None or index is None:
            return None
        loaded, segmentation = state
        return heat_data(loaded.photo, segmentation, int(index))

    def pick_class(self, event: gr.EventData) -> int:
        """Return the class whose entry in the legend was clicked."""
        return int(event._data["index"])


def build_page(model: CATSeg, untrained: bool = False, bundled: bool = False) -> gr.Blocks:
    """Build the page for a model; it loads nothing from other servers.

    Args:
        model: with any classes, back end and `max_classes`; the last two are the page's defaults.
        untrained: warn that the labels mean nothing.
        bundled: say that the weights know generated scenes only.
    """
    page = Page(model)
    scene, scene_names = example_scene()
    with gr.Blocks(
        title="catseg-fast", analytics_enabled=False, fill_width=True, delete_cache=(HOUR, HOUR)
    ) as blocks:
        gr.HTML(_head(model, untrained, bundled), elem_id="cf-head")
        state = gr.State(None, time_to_live=HOUR)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                image = gr.Image(
                    scene, format="png", type="filepath", label="Picture",
                    sources=["upload", "clipboard"], height=260, elem_id="cf-image", buttons=[],
                )  # fmt: skip
                text = gr.Textbox(
                    "; ".join(scene_names), label="Classes", lines=3, max_lines=8, elem_id="cf-classes",
                    info="Semicolons or lines separate classes, commas the synonyms of one.",
                )  # fmt: skip
                names = gr.Dropdown(
                    [(OWN, OWN), *((ready_list(name).title, name) for name in DATA_SET_LISTS)],
                    value=OWN, label="Or a data set's classes", elem_id="cf-list",
                )  # fmt: skip
                note = gr.HTML("", elem_id="cf-note")
                go = gr.Button("Segment", variant="primary", elem_id="cf-go", size="lg")
                with gr.Accordion("Settings", open=False):
                    backend = gr.Radio(page.bench.backends(), value=model.backend, label="Back end")
                    limit = gr.Radio(
                        _limits(model.max_classes), value=str(model.max_classes or "all"),
                        label="Classes aggregated per crop (max_classes)",
                        info="If there are more classes, only the best of each crop are aggregated.",
                    )  # fmt: skip
                    sliding = gr.Radio(
                        [("crops and whole picture", "crops"), ("whole picture: faster, coarser", "whole")],
                        value="crops" if model.sliding_window else "whole", label="Looks",
                    )  # fmt: skip
                least = gr.Slider(
                    0, 1, value=0, step=0.01, label="Least score", elem_id="cf-least",
                    info="Pixels whose best class has a lower score are shown as none of these.",
                )  # fmt: skip
            with gr.Column(scale=9, min_width=320):
                viewer = gr.HTML(
                    None, html_template='<div class="cf-viewer"></div>', js_on_load=_read("viewer.js"),
                    apply_default_css=False, elem_id="cf-view",
                )  # fmt: skip
                report = gr.HTML("", elem_id="cf-report")
                picker = gr.Dropdown(
                    [], label="Score map of", elem_id="cf-picker", interactive=True, visible=False,
                    info="Choose a class, or click one in the legend.",
                )  # fmt: skip
                heat = gr.HTML(
                    None, html_template='<div class="cf-heat"></div>', js_on_load=_read("heat.js"),
                    apply_default_css=False, elem_id="cf-heat",
                )  # fmt: skip
        names.input(page.pick, names, [text, note], api_visibility="private", show_progress="hidden")
        text.input(lambda: (OWN, ""), None, [names, note], api_visibility="private", show_progress="hidden")
        go.click(
            page.segment, [state, image, text, backend, limit, sliding, least],
            [state, viewer, picker, heat, report],
            concurrency_limit=1, api_visibility="private", show_progress="full", show_progress_on=[viewer],
        )  # fmt: skip
        picker.change(
            page.score_map, [state, picker], heat, api_visibility="private", show_progress="minimal"
        )
        least.release(page.view, [state, least], viewer, api_visibility="private", show_progress="hidden")
        viewer.select(page.pick_class, None, picker, api_visibility="private", show_progress="hidden")
    return blocks


def serve(page: gr.Blocks, host: str, port: int, browser: bool = False, wait: bool = True) -> str:
    """Serve the page, with `wait` until an interruption; return its address."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONOSPACE).set(
        block_title_background_fill="transparent", block_title_text_color="*body_text_color",
        block_title_padding="0", block_title_text_weight="600",
    )  # fmt: skip
    _, url, _ = page.queue().launch(
        server_name=host, server_port=port, share=False, inbrowser=browser, prevent_thread_lock=True,
        quiet=True, theme=theme, css=_read("page.css"), footer_links=[], ssr_mode=False,
        enable_monitoring=False,
    )  # fmt: skip
    if wait:
        stdout.print(f"The page is on {url} (Ctrl+C ends it)")
        page.block_thread()
    return str(url)


def example_scene() -> tuple[Image.Image, list[str]]:
    """Return the page's first picture, a generated scene, and the names of its classes."""
    scene = draw_scene(np.random.default_rng(_EXAMPLE), HELD_OUT, size=(480, 640))
    return Image.fromarray(scene.image), [
        thing if isinstance(thing, str) else thing.name for thing in scene.things
    ]


def _head(model: CATSeg, untrained: bool, bundled: bool) -> str:
    chips = [model.variant.name, str(model.device), str(model.dtype).removeprefix("torch."), __version__]
    body = "".join(f'<span class="cf-chip">{escape(chip)}</span>' for chip in chips)
    if untrained:
        body += '<span class="cf-chip cf-warn">untrained: random weights, the labels mean nothing</span>'
    banner = f'<p class="cf-banner">{escape(_BUNDLED)}</p>' if bundled else ""
    return (
        "<h1>catseg-fast</h1><p>Open-vocabulary segmentation: every pixel gets one of the classes that you "
        f'name.</p><div class="cf-chips">{body}</div>{banner}'
    )


def _limits(present: int | None) -> list[tuple[str, str]]:
    counts = sorted({64, 256, *([present] if present else [])})
    return [("all", "all"), *((f"best {count}", str(count)) for count in counts)]


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
