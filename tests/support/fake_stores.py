"""The subset of Google Cloud Storage and of the Hugging Face Hub that reading shards takes, as hooks of `http_server`."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.http_server import Web

Hook = Callable[[BaseHTTPRequestHandler], bool]


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)
    return True


def google(web: Web) -> Hook:
    """Objects are files: /BUCKET/NAME. Lists have two names a page."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        address = urlsplit(handler.path)
        if not address.path.startswith("/storage/v1/b/"):
            return False
        bucket, asked = address.path.split("/")[4], parse_qs(address.query)
        prefix, begin = asked.get("prefix", [""])[0], int(asked.get("pageToken", ["0"])[0])
        root = web.folder / bucket
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        names = [name for name in names if name.startswith(prefix)]
        if asked.get("delimiter") == ["/"]:
            names = [name for name in names if "/" not in name.removeprefix(prefix)]
        page = {"items": [{"name": name} for name in names[begin : begin + 2]]}
        more = {"nextPageToken": str(begin + 2)} if begin + 2 < len(names) else {}
        return send(handler, 200, json.dumps(page | more).encode())

    return answer


def hub(web: Web, cdn: Web, token: str) -> Hook:
    """Data sets are folders: ORG/NAME. Tars are redirected to a signed URL of `cdn`; other files come from here. Without the token:
    401. Lists have two entries a page."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        address = urlsplit(unquote(handler.path))
        parts = address.path.strip("/").split("/")
        if handler.headers.get("Authorization") != f"Bearer {token}":
            return send(handler, 401)
        if parts[0] == "api":  # api/datasets/ORG/NAME/tree/REVISION/FOLDER
            root = web.folder / parts[2] / parts[3]
            folder = root.joinpath(*parts[6:])
            if not folder.is_dir():
                return send(handler, 404)
            found = sorted(folder.iterdir())
            begin = int(parse_qs(address.query).get("cursor", ["0"])[0])
            page = [
                {"type": "directory", "oid": "0", "path": str(path.relative_to(root))}
                if path.is_dir()
                else {"type": "file", "oid": "0", "size": path.stat().st_size, "path": str(path.relative_to(root))}
                for path in found[begin : begin + 2]
            ]
            more = {"Link": f'<{web.url}{address.path}?cursor={begin + 2}>; rel="next"'} if begin + 2 < len(found) else {}
            return send(handler, 200, json.dumps(page).encode(), **more)
        path = web.folder.joinpath(*parts[1:3], *parts[5:])  # datasets/ORG/NAME/resolve/REVISION/PATH
        if parts[4] != "main" or not path.is_file():
            return send(handler, 404)
        if path.suffix != ".tar":
            return send(handler, 200, path.read_bytes())
        signed = f"{cdn.url}/{path.relative_to(web.folder)}?X-Amz-Signature=SECRET"
        about = {"X_Linked_Size": str(path.stat().st_size), "X_Linked_Etag": f'"{path.stat().st_mtime_ns:x}"'}
        return send(handler, 302, Location=signed, **about)

    return answer


def signed_only(web: Web) -> Hook:
    """What a store behind signed URLs does: HEAD is refused, and so is a token that was meant for another host."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        if handler.command == "HEAD" or "Authorization" in handler.headers or "Signature=SECRET" not in handler.path:
            return send(handler, 403)
        return False

    return answer
