"""A proxy on loopback that stands between the reader and a real S3 server and breaks some answers on purpose.

Only ranged GETs are counted and harmed; request n (from 0) gets fault `plan(n)`:

    ok          passed on
    503, 500    that status, without asking the server
    reset       the connection is reset before an answer
    truncated   the whole head, half of the body, then closed
    cut_head    closed within the head
    wrong       one byte of the body changed
    stall       the head, then nothing until the client goes
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class FaultProxy:
    """Listens on a free port; `endpoint` is what clients use instead of the server's. Use as a context manager."""

    def __init__(self, upstream: str, plan: Callable[[int], str], tls: ssl.SSLContext | None = None) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream, self.plan = (parts.hostname, parts.port), plan
        self.done: Counter[str] = Counter()
        self._number, self._lock, self._open = 0, threading.Lock(), True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._tls = tls
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._tls is not None:
            try:
                client = self._tls.wrap_socket(client, server_side=True)
            except OSError:
                return
        with client, socket.create_connection(self._upstream) as server:
            try:
                while self._exchange(client, server):
                    pass
            except OSError:
                return

    def _exchange(self, client: socket.socket, server: socket.socket) -> bool:
        """One request and its answer; false when the connection is over."""
        request = _head(client)
        if not request:
            return False
        fault = "ok"
        if request.startswith(b"GET") and b"\r\nrange:" in request.lower():
            with self._lock:
                fault = self.plan(self._number)
                self._number += 1
                self.done[fault] += 1
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault.isdigit():
            client.sendall(f"HTTP/1.1 {fault} Broken\r\nContent-Length: 8\r\n\r\nSlowDown".encode())
            return True
        server.sendall(request)
        length = _LENGTH.search(request)
        _pass(client, server, int(length[1]) if length else 0)
        answer = _head(server)
        if not answer:
            return False
        if fault == "cut_head":
            client.sendall(answer[: len(answer) // 2])
            return False
        client.sendall(answer)
        length = _LENGTH.search(answer)
        size = 0 if request.startswith(b"HEAD") or not length else int(length[1])
        if fault == "stall":
            client.recv(1)
            return False
        if fault == "truncated":
            _pass(server, client, size // 2)
            return False
        if fault == "wrong" and size:
            body = bytearray(_exactly(server, size))
            body[size // 3] ^= 0x10
            client.sendall(body)
            return True
        _pass(server, client, size)
        return True


def _head(source: socket.socket) -> bytes:
    """Up to and with the empty line, byte by byte so that nothing of the body is taken; b"" when the peer has gone."""
    head = b""
    while isinstance(source, ssl.SSLSocket) and not head.endswith(b"\r\n\r\n"):  # TLS cannot peek
        byte = source.recv(1)
        if not byte:
            return b""
        head += byte
    while not head.endswith(b"\r\n\r\n"):
        peeked = source.recv(65536, socket.MSG_PEEK)
        if not peeked:
            return b""
        end = (head[-3:] + peeked).find(b"\r\n\r\n")
        take = len(peeked) if end < 0 else end + 4 - len(head[-3:])
        head += _exactly(source, take)
    return head


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = source.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise OSError("peer has gone")
        data += piece
    return bytes(data)


def _pass(source: socket.socket, target: socket.socket, size: int) -> None:
    while size:
        piece = source.recv(min(size, 1 << 20))
        if not piece:
            raise OSError("peer has gone")
        target.sendall(piece)
        size -= len(piece)
