"""A server on the loopback interface that misbehaves as told."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What a path answers.

    Attributes:
        drops: how many times the connection breaks after ``drop_after`` bytes of the body.
        stalls: how many times nothing more comes after ``drop_after`` bytes.
        later: after the first answer the file has this content.
        ranges: honours Range; ``if_range``: and looks at If-Range.
        validators: sends ETag and Last-Modified.
        announced: a Content-Length that is not the body's; None sends none if ``length`` is False.
    """

    body: bytes = b""
    status: int = 200
    drops: int = 0
    stalls: int = 0
    drop_after: int = 0
    later: bytes | None = None
    ranges: bool = True
    if_range: bool = True
    validators: bool = True
    weak: bool = False
    length: bool = True
    announced: int | None = None
    slow: Callable[[], None] | None = None
    requests: list[dict] = field(default_factory=list)
    sent: int = 0


def tag_of(body: bytes) -> str:
    return f'"{zlib.crc32(body):08x}"'


class Server:
    """``with Server({"/a": Page(...)}) as server: server.url("/a")``"""

    def __init__(self, pages: dict[str, Page]) -> None:
        self.pages = pages
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *args) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{path}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        page = self.pages.get(request.path, Page(status=404))
        page.requests.append(dict(request.headers))
        if request.headers["User-Agent"].startswith("Python-urllib"):
            page = Page(status=403)
        if page.status != 200:
            request.send_error(page.status)
            return
        body = page.later if page.later is not None and len(page.requests) > 1 else page.body
        tag = "W/" * page.weak + tag_of(body)
        first = 0
        asked = request.headers["Range"]
        if asked and page.ranges and not (page.if_range and request.headers["If-Range"] not in (tag, None)):
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                request.send_error(416)
                return
        request.send_response(206 if first else 200)
        if first:
            request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if page.length:
            request.send_header("Content-Length", str((page.announced or len(body)) - first))
        if page.validators:
            request.send_header("ETag", tag)
        request.end_headers()
        rest = body[first:]
        breaks = len(page.requests) <= page.drops
        stalls = len(page.requests) <= page.stalls
        piece = rest[: page.drop_after] if breaks or stalls else rest
        for start in range(0, len(piece), 1 << 16):
            request.wfile.write(piece[start : start + (1 << 16)])
            page.sent += len(piece[start : start + (1 << 16)])
            if page.slow:
                page.slow()
        if stalls:
            self.released.wait(10)
        request.close_connection = True
