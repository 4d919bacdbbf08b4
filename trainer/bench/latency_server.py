"""`python -m trainer.bench.latency_server FOLDER MILLISECONDS`: serves the files of a folder with a latency per request.

`/NAME` is a web server's file, `/BUCKET/NAME` an S3 server's object. Supports what reading shards needs: HEAD, and GET with an open
range (`bytes=N-`). Prints its port; exits when standard input is closed.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def server(folder: Path, seconds: float) -> ThreadingHTTPServer:
    """A server on a free port, not yet running. seconds: latency per request."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._reply()

        def do_GET(self) -> None:
            self._reply(body=True)

        def _reply(self, body: bool = False) -> None:
            time.sleep(seconds)
            path = folder / self.path.split("?")[0].rpartition("/")[2]
            if not path.is_file():
                self.send_error(404)
                return
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                begin = min(int(wanted[1]), size) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
                self.send_header("Content-Length", str(size - begin))
                self.end_headers()
                self.wfile.flush()
                if body and begin < size:
                    try:
                        self.connection.sendfile(file, begin)
                    except (BrokenPipeError, ConnectionResetError):
                        self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    return found


def main() -> None:
    serving = server(Path(sys.argv[1]), float(sys.argv[2]) / 1000)
    print(serving.server_port, flush=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
