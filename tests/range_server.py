"""An HTTP server on loopback that serves a folder with byte ranges, counts what is asked, and breaks some answers on purpose.

Request n (from 0) gets fault `plan(n)`: "ok"; "503" that status; "reset" the connection is reset before an answer; "truncated" the
whole head, half of the body, then closed. `answers`: paths that are no files, by what follows `?` → status and body.
"""

from __future__ import annotations

import functools
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class RangeServer:
    """`url` is the folder. Use as a context manager; `requests`, `bytes` and `paths` count since `reset()`."""

    def __init__(self, folder: Path, plan: Callable[[int], str] = lambda number: "ok") -> None:
        self.folder, self.plan = folder, plan
        self.answers: dict[str, Callable[[str], tuple[int, bytes]]] = {}
        self.allows: Callable[[str], bool] = lambda query: True
        self.lock, self.number = threading.Lock(), 0
        self.done: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.requests, self.bytes, self.paths = 0, 0, Counter[str]()

    def __enter__(self) -> RangeServer:
        server = self

        class Handler(_Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._http.server_close()


@functools.lru_cache(maxsize=64)
def _content(path: str, changed: int) -> bytes:
    return Path(path).read_bytes()


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        owner, (path, _, query) = self.owner, unquote(self.path).partition("?")
        with owner.lock:
            fault = owner.plan(owner.number)
            owner.number += 1
            owner.requests += 1
            owner.paths[path] += 1
            owner.done[fault] += 1
            owner.headers.append(dict(self.headers))
        file = owner.folder / path.lstrip("/")
        if path in owner.answers:
            status, data = owner.answers[path](query)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        elif not owner.allows(query):
            self._plain(403)
        elif fault == "503":
            self._plain(503)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif not file.is_file():
            self._plain(404)
        else:
            self._file(_content(str(file), file.stat().st_mtime_ns), body, cut=fault == "truncated")

    def _plain(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, data: bytes, body: bool, cut: bool) -> None:
        start, stop, status = 0, len(data), 200
        if match := RANGE.match(self.headers.get("Range", "")):
            first, last = match.groups()
            start, stop = (
                (int(first), int(last) + 1 if last else len(data)) if first else (len(data) - int(last), len(data))
            )
            stop, status = min(stop, len(data)), 206
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        sent = data[start : start + (stop - start) // 2] if cut else data[start:stop]
        with self.owner.lock:
            self.owner.bytes += len(sent)
        try:
            self.wfile.write(sent)
        except OSError:  # a client that has seen enough
            self.close_connection = True
            return
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
