"""A web server of a folder with chosen faults: errors, cut connections, slow bytes, latency; with or without ranges."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Web:
    """faults: {file name: what the next GETs of it meet}: an int is a status, "cut" ends after half, "slow" sends 4 KiB at a time,
    "trickle" 64 bytes, "headers" a byte of a header that never ends, "garbled" turns a byte over. hook: is given every request
    first, True = it answered. gets, heads: how often each file was asked for; running, most: GETs at the same time."""

    def __init__(self, folder: Path, latency: float, ranges: bool) -> None:
        self.folder, self.latency, self.ranges = folder, latency, ranges
        self.faults: dict[str, list[int | str]] = {}
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.url = ""
        self.hook: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False


@contextmanager
def serving(folder: Path, latency: float = 0.0, ranges: bool = True) -> Iterator[Web]:
    web = Web(folder, latency, ranges)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            web.heads[self._name()] += 1
            if not web.hook(self):
                self._reply(body=False)

        def _name(self) -> str:
            return self.path.partition("?")[0].rpartition("/")[2]

        def do_GET(self) -> None:
            name = self._name()
            with web.lock:
                web.gets[name] += 1
                web.running += 1
                web.most = max(web.most, web.running)
                faults = web.faults.get(name, [])
                fault = faults.pop(0) if faults else 0
            self._counted = True
            try:
                if not web.hook(self):
                    self._reply(body=True, fault=fault)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                self._over()

        def _over(self) -> None:
            """Once per GET, before its last bytes go: with them the client may ask for the next file already."""
            with web.lock:
                web.running -= self._counted
                self._counted = False

        def _reply(self, body: bool, fault: int | str = 0) -> None:
            time.sleep(web.latency)
            path = web.folder / unquote(self.path.partition("?")[0]).lstrip("/")
            if isinstance(fault, int) and fault:
                self.send_response(fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            tag = f'"{path.stat().st_mtime_ns:x}"'
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-")) if web.ranges else 0
            if self.headers.get("If-Range", tag) != tag:
                begin = 0
            if fault == "garbled":
                data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
            part = data[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(part)))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", tag)
            self.end_headers()
            if not body:
                return
            if fault == "cut":
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
                return
            step = {"slow": 4096, "trickle": 64}.get(str(fault), len(part) or 1)
            for at in range(0, len(part), step):
                if body and at + step >= len(part):
                    self._over()
                self.wfile.write(part[at : at + step])
                time.sleep(0.05 if fault in ("slow", "trickle") else 0)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
