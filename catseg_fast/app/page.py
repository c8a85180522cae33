"""The page of `catseg-fast app`, in Gradio: its components and their events."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware
from torch import OutOfMemoryError, Tensor

from catseg_fast._version import __version__
from catseg_fast.app.guard import Guard, others_wait
from catseg_fast.app.jobs import Jobs, Stopped
from catseg_fast.app.limits import Limits
from catseg_fast.app.viewer import heat_data, report_html, viewer_data
from catseg_fast.app.visitors import Kept, Visitors
from catseg_fast.app.workbench import Workbench, read_names
from catseg_fast.console import stdout
from catseg_fast.data.scenes import draw_scene
from catseg_fast.data.scenes.words import HELD_OUT
from catseg_fast.errors import CATSegError, InputError
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


def picture(**options: Any) -> gr.Image:
    """Return a component for a picture that the visitor chooses; its value is the file as it was uploaded.

    Gradio's component decodes the file, and writes it again in 8 bits. A subclass is no way out: Gradio
    writes a stub file beside the module of each.

    Args:
        **options: of `gradio.Image`.
    """
    component = gr.Image(type="filepath", **options)
    component.preprocess = lambda payload: payload.path if payload else None
    return component


class Page:
    """Handlers of the page's events.

    Of each visitor the encoded picture and the last segmentation are kept. If vocabulary, back end or
    max_classes change, the picture is not encoded again.

    Args:
        model: of any classes.
        limits: of what visitors may take.
        others_wait: tells whether calls wait in the queue.
    """

    def __init__(
        self,
        model: CATSeg,
        limits: Limits | None = None,
        others_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        self.limits = limits or Limits()
        self.bench = Workbench(model, self.limits.kept // 4)
        self.visitors = Visitors(self.limits.visitors, self.limits.kept, HOUR)
        self.jobs = Jobs(self.limits.seconds, self.limits.seconds_shared, others_wait)

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
        path: str | None,
        text: str,
        backend: str,
        limit: str,
        sliding: str,
        min_score: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Return the viewer's value, the choice of classes, no score map, and the report."""
        session = _session(request)
        if path is None:
            raise gr.Error("Drop a picture first.", print_exception=False)
        try:
            names = read_names(text)
            if len(names) > self.limits.names:
                raise InputError(f"classes: {len(names):,} names; this page takes {self.limits.names:,}")
            for note in separator_notes(names):
                gr.Info(escape(note))
            progress(0, desc="Segmenting")
            before = self.visitors.get(session)
            with self.jobs.running(session):
                loaded, segmentation, report = self.bench.segment(
                    path,
                    names,
                    before.loaded if before else None,
                    backend=backend,
                    max_classes=None if limit == "all" else int(limit),
                    sliding_window=sliding == "crops",
                    progress=lambda done, total: progress((done, total), desc="Class names"),
                )
        except (*VISITOR_ERRORS, Stopped) as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error
        kept = self.visitors.put(session, Kept(loaded, segmentation))
        classes, view = segmentation.classes, _view(loaded.photo, segmentation, min_score)
        found = [entry["index"] for entry in view["classes"] if entry["colour"]]
        rest = sorted(set(range(len(classes))) - set(found))
        choices = [(classes[index], index) for index in (*found, *rest)]
        has_scores = kept is not None and kept.segmentation.logits is not None
        picker = gr.Dropdown(choices=choices, value=None, visible=has_scores)
        return view, picker, None, report_html(report)

    def view(self, min_score: float, request: gr.Request) -> Any:
        """Return the viewer's value, in which pixels whose best class has a lower score have no class."""
        kept = self.visitors.get(_session(request))
        return _view(kept.loaded.photo, kept.segmentation, min_score) if kept else gr.skip()

    def score_map(self, index: int | None, request: gr.Request) -> Any:
        """Return the value of the score map's viewer for a class."""
        if index is None:
            return None
        kept = self.visitors.get(_session(request))
        if kept is None:
            raise gr.Error("Your last answer is no longer kept: segment again.", print_exception=False)
        if kept.segmentation.logits is None:
            raise gr.Error("Scores of so many classes are not kept.", print_exception=False)
        return heat_data(kept.loaded.photo, kept.segmentation, int(index))

    def leave(self, request: gr.Request) -> None:
        """Stop the call of a visitor who has closed the page, and drop what is kept."""
        self.jobs.stop(_session(request))
        self.visitors.forget(_session(request))

    def pick_class(self, event: gr.EventData) -> int:
        """Return the class whose entry in the legend was clicked."""
        return int(event._data["index"])


class PageBlocks(gr.Blocks):
    """The page's components, and what their events call."""

    handlers: Page


def build_page(
    model: CATSeg, untrained: bool = False, bundled: bool = False, limits: Limits | None = None
) -> PageBlocks:
    """Build the page for a model; it loads nothing from other servers.

    Args:
        model: with any classes, back end and `max_classes`; the last two are the page's defaults.
        untrained: warn that the labels mean nothing.
        bundled: say that the weights know generated scenes only.
        limits: of what visitors may take.
    """
    scene, scene_names = example_scene()
    with PageBlocks(
        title="catseg-fast", analytics_enabled=False, fill_width=True, delete_cache=(HOUR, HOUR)
    ) as blocks:
        page = blocks.handlers = Page(model, limits, lambda: others_wait(blocks))
        gr.HTML(_head(model, untrained, bundled), elem_id="cf-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                image = picture(
                    value=scene, format="png", label="Picture", sources=["upload", "clipboard"], height=260,
                    elem_id="cf-image", buttons=[],
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
                with gr.Row():
                    go = gr.Button("Segment", variant="primary", elem_id="cf-go", size="lg", scale=3)
                    stop = gr.Button("Stop", elem_id="cf-stop", size="lg", scale=1, min_width=80)
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
        call = go.click(
            page.segment, [image, text, backend, limit, sliding, least], [viewer, picker, heat, report],
            concurrency_limit=1, api_visibility="private", show_progress="full", show_progress_on=[viewer],
        )  # fmt: skip
        stop.click(None, None, None, cancels=[call], api_visibility="private")
        picker.change(page.score_map, picker, heat, api_visibility="private", show_progress="minimal")
        least.release(page.view, least, viewer, api_visibility="private", show_progress="hidden")
        viewer.select(page.pick_class, None, picker, api_visibility="private", show_progress="hidden")
        blocks.unload(page.leave)
    return blocks


def serve(page: PageBlocks, host: str, port: int, browser: bool = False, wait: bool = True) -> str:
    """Serve the page, with `wait` until an interruption; return its address."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONOSPACE).set(
        block_title_background_fill="transparent", block_title_text_color="*body_text_color",
        block_title_padding="0", block_title_text_weight="600",
    )  # fmt: skip
    limits = page.handlers.limits
    guard = Middleware(Guard, limits=limits, blocks=lambda: page, leave=page.handlers.jobs.stop)
    _, url, _ = page.queue(max_size=limits.waiting).launch(
        server_name=host, server_port=port, share=False, inbrowser=browser, prevent_thread_lock=True,
        quiet=True, theme=theme, css=_read("page.css"), footer_links=[], ssr_mode=False,
        enable_monitoring=False, max_file_size=limits.upload, app_kwargs={"middleware": [guard]},
        state_session_capacity=10 * limits.visitors,
    )  # fmt: skip
    if wait:
        stdout.print(f"The page is on {url} (Ctrl+C ends it)")
        page.block_thread()
    return str(url)


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


def _view(photo: Tensor, segmentation: Segmentation, min_score: float) -> dict[str, Any]:
    return viewer_data(photo, segmentation.with_min_score(min_score or None))


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
