"""A proxy on the loopback that forwards to a real server and injects faults into the exchange.

    with Proxy("http://127.0.0.1:5000") as proxy:
        proxy.inject(Fault(status=500, method="PUT", first=3))        # the third PUT is answered 500
        proxy.inject(Fault(cut=1000, path="/blobs/"))                 # one download breaks off after 1000 bytes
        proxy.inject(Fault(status=403, times=ALWAYS))                 # and from here on nothing is allowed
        … talk to proxy.url …
        proxy.heal()

A fault counts the requests that it matches and acts on the `first` of them (from 1) and as many after it as `times` says. The
first of the faults that acts on a request wins. `proxy.requests` has every request, with the status that the client saw (0
where the connection broke before one), in the order in which they ended.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

CHUNK = 1 << 16
ALWAYS = 1 << 30
# Headers of one connection, which a proxy does not pass on.
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection", "expect"}


@dataclass(frozen=True)
class Fault:
    """What happens to a request whose method and path (with its query; both regular expressions) match. Give one of:

    - `status`: it is answered with that, and never reaches the server; `headers` go with it, and `body`.
    - `reset`: the connection is reset after that many bytes of the request's body; the server sees a broken request.
    - `cut`: the answer's body breaks off after that many bytes.
    - `corrupt`: the byte at that place of the answer's body has a bit flipped.
    - `delay`: the answer waits that many seconds.
    - `lost`: the server does its work, and the answer is lost.
    """

    method: str = ""
    path: str = ""
    first: int = 1
    times: int = 1
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    reset: int | None = None
    cut: int | None = None
    corrupt: int | None = None
    delay: float | None = None
    lost: bool = False


@dataclass(frozen=True)
class Request:
    """What went through. `sent` and `received` are bytes of the request's and the answer's body."""

    method: str
    path: str
    status: int
    sent: int
    received: int


class Proxy:
    """The proxy; a context manager. The server may come and go: while it is away, connections are reset."""

    def __init__(self, server: str) -> None:
        self.host = urlsplit(server).netloc
        self.requests: list[Request] = []
        self._faults: list[tuple[Fault, list[int]]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._listener = _Listener(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_port}"

    def inject(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append((fault, [0]))

    def heal(self) -> None:
        """Inject no more faults, and forget the requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def count(self, method: str = "", path: str = "") -> int:
        """How many requests matched."""
        return sum(bool(re.search(method, seen.method) and re.search(path, seen.path)) for seen in self.requests)

    def fault_of(self, method: str, path: str) -> Fault:
        """The fault that acts on a request; one that does nothing where there is none."""
        found = Fault()
        with self._lock:
            for fault, seen in self._faults:
                if re.search(fault.method, method) and re.search(fault.path, path):
                    seen[0] += 1
                    if found == Fault() and fault.first <= seen[0] < fault.first + fault.times:
                        found = fault
        return found


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: broken connections are what this is for."""


class _BrokenError(Exception):
    """The exchange ends here, on purpose or because the server is away."""


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are kept."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _exchange(self) -> None:
        self.sent = self.received = self.seen = 0
        fault = self.owner.fault_of(self.command, self.path)
        try:
            self._forward(fault)
        except (_BrokenError, OSError, http.client.HTTPException):
            self._reset()
        finally:
            self.owner.requests.append(Request(self.command, self.path, self.seen, self.sent, self.received))

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = do_OPTIONS = _exchange  # noqa: N815

    def _forward(self, fault: Fault) -> None:
        if fault.status is not None:
            for _ in self._body(Fault()):
                pass
            self._head(fault.status, [*fault.headers, ("Content-Length", str(len(fault.body)))])
            if self.command != "HEAD":
                self.wfile.write(fault.body)
            return
        server = http.client.HTTPConnection(self.owner.host, timeout=60)
        try:
            # The client's own Host goes with it, so that an address which the server makes from it leads back here.
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            body = self._body(fault) if self._has_body() else None
            if body is not None and "content-length" not in {name.lower() for name in headers}:
                headers["Transfer-Encoding"] = "chunked"
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                server.putheader(name, value)
            server.endheaders(body, encode_chunked="Transfer-Encoding" in headers)
            self._answer(server.getresponse(), fault)
        finally:
            server.close()

    def _answer(self, response: http.client.HTTPResponse, fault: Fault) -> None:
        if fault.delay is not None:
            time.sleep(fault.delay)
        if fault.lost:
            response.read()
            raise _BrokenError
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP]
        whole = self.command != "HEAD" and response.status >= 200 and response.status not in (204, 304)
        chunked = whole and response.getheader("Content-Length") is None
        self._head(response.status, [*headers, *([("Transfer-Encoding", "chunked")] if chunked else [])])
        if not whole:
            return
        while piece := response.read(CHUNK):
            if fault.corrupt is not None and self.received <= fault.corrupt < self.received + len(piece):
                at = fault.corrupt - self.received
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            if fault.cut is not None and self.received + len(piece) > fault.cut:
                self.wfile.write(piece[: fault.cut - self.received])
                self.wfile.flush()
                # Not a reset, which may overtake what was sent: the connection closes early.
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.received += len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.seen = status
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _has_body(self) -> bool:
        return "Content-Length" in self.headers or "Transfer-Encoding" in self.headers

    def _body(self, fault: Fault) -> Iterator[bytes]:
        """The request's body as it comes, without its chunks' sizes."""
        for piece in self._chunks() if "Transfer-Encoding" in self.headers else self._plain():
            if fault.reset is not None and self.sent + len(piece) > fault.reset:
                raise _BrokenError
            self.sent += len(piece)
            yield piece
        if fault.reset is not None:
            raise _BrokenError

    def _plain(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(left, CHUNK))
            if not piece:
                raise _BrokenError
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _reset(self) -> None:
        """Close with a reset (RST), not an orderly end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
