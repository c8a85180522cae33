"""A visitor of the page over HTTP, who sends what a browser sends."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

API = "/gradio_api"


@dataclass
class Answer:
    """Answer to a call, or why there is none.

    Attributes:
        success: whether it was answered.
        data: values of the outputs.
        error: the message to the visitor, if not.
        places: places in the queue that were shown, 0 for the next one.
        sizes: the queue's lengths that were shown.
    """

    success: bool = False
    data: list[Any] = field(default_factory=list)
    error: str = ""
    places: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return [entry["name"] for entry in self.data[0]["classes"]]


class Client:
    """A session.

    Args:
        address: address of the page.
        session: Gradio's session hash.
    """

    def __init__(self, address: str, session: str | None = None) -> None:
        self.address, self.session = address.rstrip("/"), session or uuid.uuid4().hex
        self.config = json.loads(self.request("/config")[1])
        (self.segment_index,) = (d["id"] for d in self.config["dependencies"] if len(d["inputs"]) == 6)
        self.score_index = next(
            d["id"] for d in self.config["dependencies"] if len(d["inputs"]) == 1 and len(d["outputs"]) == 1
        )

    def request(
        self, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Send a request; return the status and the content of the response."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, data=body, headers=names)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, content: bytes, name: str = "x.png") -> tuple[int, str]:
        """Upload a file; return the status, and its path on the server or the error."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = (head + "Content-Type: image/png\r\n\r\n").encode() + content + f"\r\n--{mark}--\r\n".encode()
        status, text = self.request(
            f"{API}/upload", body, Content_Type=f"multipart/form-data; boundary={mark}"
        )
        return status, json.loads(text)[0] if status == 200 else text.decode()

    def join(self, index: int, data: list[Any]) -> tuple[int, Any]:
        """Call an event; return the status, and the event's id or the error."""
        body = {"data": data, "fn_index": index, "session_hash": self.session, "trigger_id": None}
        status, text = self.request(
            f"{API}/queue/join", json.dumps(body).encode(), Content_Type="application/json"
        )
        content = json.loads(text) if text.startswith(b"{") else {"detail": text.decode()}
        return status, content["event_id"] if status == 200 else content["detail"]

    def join_segment(self, path: str | None, text: str, sliding: str = "whole") -> tuple[int, Any]:
        """Press "Segment"."""
        picture = path and {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
        return self.join(self.segment_index, [picture, text, "auto", "all", sliding, 0])

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the server's messages about the session's calls."""
        url = f"{self.address}{API}/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(url, timeout=120) as response:
            for line in response:
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])

    def wait(self) -> Answer:
        """Wait for the answer to a call."""
        answer = Answer()
        for message in self.messages():
            if message["msg"] == "estimation":
                answer.places.append(message["rank"])
                answer.sizes.append(message["queue_size"])
            elif message["msg"] == "process_completed":
                output = message["output"] or {}
                answer.success = message["success"]
                answer.data, answer.error = output.get("data") or [], str(output.get("error") or "")
                break
        return answer

    def segment(self, path: str | None, text: str, sliding: str = "whole") -> Answer:
        """Press "Segment" and wait."""
        status, detail = self.join_segment(path, text, sliding)
        return self.wait() if status == 200 else Answer(error=str(detail))

    def cancel(self, event: str) -> int:
        """Press "Stop"; return the status."""
        body = {"session_hash": self.session, "fn_index": self.segment_index, "event_id": event}
        return self.request(f"{API}/cancel", json.dumps(body).encode(), Content_Type="application/json")[0]
