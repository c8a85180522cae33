"""Pictures that are not paths: file objects, file URLs, and http URLs of a local server."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from catseg_fast.inference import sources
from catseg_fast.inference.images import load_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
CHW = torch.from_numpy(RGB.transpose(2, 0, 1).astype(np.float32))


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = png()
        if self.path == "/photo.png":
            self._send(content)
        elif self.path == "/moved":
            self._redirect("/photo.png")
        elif self.path == "/local":
            self._redirect("file:///etc/passwd")
        elif self.path == "/circle":
            self._redirect("/circle")
        elif self.path == "/page":
            self._send(b"<html>no picture</html>")
        elif self.path == "/half":
            self._send(content[:60], len(content))
        elif self.path == "/endless":
            self._send(b"", None)
            try:
                for _ in range(1000):
                    self.wfile.write(bytes(100))
                    time.sleep(0.01)
            except OSError:
                pass
        elif self.path == "/slow":
            time.sleep(1)
        else:
            self.send_error(404)

    def _send(self, content: bytes, length: int | None = -1) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(len(content) if length == -1 else length))
        self.end_headers()
        self.wfile.write(content)

    def _redirect(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        service.daemon_threads = True
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Stream(io.RawIOBase):
    """A file that can only be read once, as a pipe."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self.content.readinto(buffer)


def test_open_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    with path.open("rb") as file:
        file.read(10)
        assert torch.equal(load_image(file), CHW)
        assert torch.equal(load_image(file), CHW)
    assert torch.equal(load_image(io.BytesIO(png())), CHW)
    assert torch.equal(load_image(io.BufferedReader(Stream(png()))), CHW)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with path.open() as text, pytest.raises(TypeError, match=r"photo: .* as text; open it with mode 'rb'"):
        load_image(text, "photo")  # type: ignore[arg-type]
    with path.open("rb") as file, pytest.raises(ValueError, match=r"photo: cannot read .*notes\.png': not a"):
        load_image(file, "photo")
    with pytest.raises(ValueError, match=r"photo: cannot read .*notes\.png': .*closed"):
        load_image(file, "photo")
    with pytest.raises(ValueError, match="photo: cannot read the 3 bytes: not a picture"):
        load_image(b"abc", "photo")
    with pytest.raises(ValueError, match="photo: cannot read the 60 bytes: "):
        load_image(png()[:60], "photo")


def test_a_file_url(tmp_path: Path) -> None:
    path = tmp_path / "a photo.png"
    path.write_bytes(png())
    assert torch.equal(load_image(path.as_uri()), CHW)
    with pytest.raises(FileNotFoundError, match=r"photo: no such file: .*none\.png"):
        load_image((tmp_path / "none.png").as_uri(), "photo")
    with pytest.raises(ValueError, match=r"photo: .* is on another machine"):
        load_image("file://elsewhere/photo.png", "photo")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:photo.png", "c:photo.png"):
        Path(name).write_bytes(png())
        assert torch.equal(load_image(name), CHW)


@pytest.mark.parametrize("page", ["/photo.png", "/moved"])
def test_a_web_url(server: str, page: str) -> None:
    assert torch.equal(load_image(server + page), CHW)


@pytest.mark.parametrize(
    ("page", "error", "message"),
    [
        ("/none", RuntimeError, "photo: .*/none answers 404"),
        ("/circle", RuntimeError, "photo: .*/circle answers 302"),
        ("/local", RuntimeError, "photo: .*/local answers 302 .*file:///etc/passwd' is not allowed"),
        ("/page", ValueError, "photo: cannot read 'http.*/page': not a picture"),
        ("/half", RuntimeError, r"photo: .*/half ended \d+ bytes early"),
    ],
)
def test_answers_that_are_no_pictures(server: str, page: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_image(server + page, "photo")


def test_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sources, "URL_BYTES", 64)
        for page in ("/photo.png", "/endless"):
            with pytest.raises(ValueError, match=r"photo: .* holds .*, and at most .* are fetched"):
                load_image(server + page, "photo")
    monkeypatch.setattr(sources, "URL_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match=r"photo: .*/endless took longer than 0\.05 s"):
        load_image(server + "/endless", "photo")
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"photo: .*/slow.* 0\.1 s"):
        load_image(server + "/slow", "photo")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"photo: cannot reach http://127\.0\.0\.1:9/a\.png: "):
        load_image("http://127.0.0.1:9/a.png", "photo")
    with pytest.raises(RuntimeError, match="photo: cannot reach"):
        load_image("http://127.0.0.1:port/a.png", "photo")
