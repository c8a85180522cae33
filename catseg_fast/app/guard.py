"""Limits of requests between the network and Gradio, and the end of calls that nobody waits for."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from catseg_fast.app.limits import Limits

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOADS_COUNT = 2 * 3600  # seconds; Gradio deletes files of an hour once an hour
_FORM = 2**16  # bytes around a file in an upload
_PATIENCE = 10  # times the limit of a request, which are read and dropped before it is refused


class _TooLarge(Exception):
    """Raised for a request's body that goes on beyond its limit."""


class Guard:
    """Middleware of an ASGI application.

    Args:
        app: the application.
        limits: of requests.
        blocks: returns the page, whose queue is looked at.
        leave: called with the session of a visitor who has stopped a call, or has left while it ran.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        blocks: Callable[[], gr.Blocks],
        leave: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.limits, self.blocks, self.leave, self._clock = app, limits, blocks, leave, clock
        self._open = 0
        self._uploads: deque[tuple[float, int]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._open >= self.limits.connections:
            await _refuse(send, 503, "Too many connections; try again later.")
            return
        self._open += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._open -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD"):
            if path.endswith("/queue/data"):
                await self._serve_stream(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        upload = path.endswith("/upload")
        limit = self.limits.upload + _FORM if upload else self.limits.request
        size = _content_length(scope)
        if size is not None and size > limit:
            await _drain(receive, limit)
            await _refuse(send, 413, _too_large(limit))
            return
        if upload and sum(count for _, count in self._recent()) + (size or 0) > self.limits.uploads:
            await _drain(receive, limit)
            await _refuse(send, 429, "Too many files were uploaded; try again later.")
            return
        started, taken = False, 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if path.endswith(("/queue/join", "/cancel")):
                await self._serve_call(scope, await _body(counted), receive, noted)
            else:
                await self.app(scope, counted, noted)
        except _TooLarge:
            if not started:
                await _drain(receive, limit)
                await _refuse(send, 413, _too_large(limit))
        finally:
            if upload:
                self._uploads.append((self._clock(), taken))

    async def _serve_call(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Serve a call that joins the queue, or the end of one."""
        session = _session_of(body)
        if scope["path"].endswith("/cancel"):
            self.leave(session)
        else:
            problem = self._why_not(session, (scope.get("client") or ("",))[0])
            if problem:
                await _refuse(send, 503, problem)
                return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)
        if scope["path"].endswith("/join"):
            take_turns(self.blocks())

    async def _serve_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the messages about a session's calls; if it breaks off, the visitor has left."""
        complete = False

        async def noted(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, noted)
        finally:
            if not complete:
                query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
                self.leave(query.get("session_hash", [""])[0])

    def _why_not(self, session: str, address: str) -> str | None:
        """Return why a session's call may not join the queue; None if it may."""
        calls = calls_of(self.blocks())
        if sum(call.session_hash == session for call in calls) >= self.limits.waiting_each:
            return "Your last call is not done yet; stop it first."
        if sum(_address_of(call) == address for call in calls) >= self.limits.waiting_address:
            return "Too many calls from your network address wait; try again later."
        if len(calls) >= self.limits.waiting:
            return "Too many visitors wait; try again later."
        return None

    def _recent(self) -> deque[tuple[float, int]]:
        """Return when files were uploaded that are still there, and their bytes."""
        while self._uploads and self._uploads[0][0] < self._clock() - UPLOADS_COUNT:
            self._uploads.popleft()
        return self._uploads


def others_wait(blocks: gr.Blocks) -> bool:
    """Check whether calls wait in the page's queue."""
    return any(queue.queue for queue in blocks._queue.event_queue_per_concurrency_id.values())


def take_turns(blocks: gr.Blocks) -> None:
    """Order the queue so that network addresses take turns, each with its calls as they came."""
    for queue in blocks._queue.event_queue_per_concurrency_id.values():
        seen: Counter[str] = Counter()
        turns = []
        for call in queue.queue:
            address = _address_of(call)
            turns.append(seen[address])
            seen[address] += 1
        order = sorted(range(len(turns)), key=turns.__getitem__)
        queue.queue[:] = [queue.queue[index] for index in order]


def calls_of(blocks: gr.Blocks) -> list[Any]:
    """Gradio's events that wait or run."""
    queue = blocks._queue
    waiting = [call for each in queue.event_queue_per_concurrency_id.values() for call in each.queue]
    return waiting + [call for calls in queue.active_jobs if calls for call in calls]


def _address_of(call: Any) -> str:
    client = getattr(call.request, "client", None)
    return client.host if client else ""


def _content_length(scope: Scope) -> int | None:
    value = dict(scope["headers"]).get(b"content-length", b"")
    return int(value) if value.isdigit() else None


def _session_of(body: bytes) -> str:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return str(content.get("session_hash", "")) if isinstance(content, dict) else ""


async def _drain(receive: Receive, limit: int) -> None:
    """Read on, up to a multiple of the limit: a browser shows no answer before it has sent everything."""
    taken = 0
    while taken <= _PATIENCE * limit:
        message = await receive()
        taken += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(limit: int) -> str:
    return f"The request is larger than {limit / 2**20:.0f} MiB."


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
