"""`catseg-fast app`: a page in the browser. Torch and Gradio are imported when it runs."""

from __future__ import annotations

import errno
import socket
from typing import Annotated

import typer

from catseg_fast.backend import choose_backend, default_device
from catseg_fast.cli.options import (
    BUNDLED_NOTE,
    BUNDLED_WEIGHTS,
    Backend,
    Device,
    Dtype,
    MaxPixels,
    Seed,
    TextCache,
    VariantName,
    Weights,
    build_model,
    default_classes,
    weights_or_bundled,
)
from catseg_fast.config import MAX_PIXELS
from catseg_fast.console import Debug, plain_errors, say_note, stderr
from catseg_fast.errors import MissingPackageError, RunError

EXAMPLES = (
    "catseg-fast app --weights v2-vitl",
    "catseg-fast app --weights model_base.pth --port 8000 --open",
    "catseg-fast app --weights v2-vitl --host 0.0.0.0",
)


def app(
    weights: Weights = None,
    variant: VariantName = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address of the page; with 0.0.0.0, the whole network can use it, without a password.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="The page's port.")] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    text_cache: TextCache = True,
    max_pixels: MaxPixels = MAX_PIXELS,
    max_names: Annotated[
        int, typer.Option("--max-names", metavar="N", min=1, help="Most class names of a visitor's call.")
    ] = 5000,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Segment pictures on a page in the browser.

    Drop a picture, and type class names or choose a data set's list. The page shows the label map, the class
    under the pointer, each class's score map, times and memory. By default it is only served on this machine,
    and it loads nothing from other servers.
    """
    with plain_errors(debug):
        # Checks without torch come first, as its import takes seconds.
        from catseg_fast.checkpoints.hub import resolve

        check_free(host, port)
        weights = weights_or_bundled(weights, variant)
        file = None if weights is None else resolve(weights)
        bundled = weights == BUNDLED_WEIGHTS
        if bundled:
            say_note(BUNDLED_NOTE)
        try:
            from catseg_fast.app.limits import Limits
            from catseg_fast.app.page import build_page, serve
        except ImportError as error:
            raise MissingPackageError(
                f"app: needs Gradio ({error}): pip install 'catseg-fast[app]'"
            ) from error
        choose_backend(backend, device or default_device())  # fail before the model is loaded
        with stderr.status("Loading the model …"):
            model = build_model(
                file, variant, default_classes(weights), seed, device=device, dtype=dtype,
                backend=backend, text_cache=text_cache, max_pixels=max_pixels,
            )  # fmt: skip
        page = build_page(model, untrained=weights is None, bundled=bundled, limits=Limits(names=max_names))
        serve(page, host, port, browser)


def check_free(host: str, port: int) -> None:
    """Check that a server can listen on an address.

    Raises:
        RunError: if it cannot; the message says why and what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"--port: {port} is taken on {host}; choose another") from error
        raise RunError(f"--host: cannot listen on {host}:{port}: {error.strerror or error}") from error
