"""A web server on loopback with configurable faults: it cuts, changes or redirects files, or requires a login."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Site:
    """What the server sends, and what it received.

    `files`, their content `types` and `names` (Content-Disposition) by path; `redirects`: path -> URL. `cut`: per
    request, the number of bytes after which the connection is closed. `ranges`: whether Range is supported. `token`:
    required if not "". `requests`: (path, Range header) of each, and `tokens` their Authorization headers.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    ranges: bool = True
    token: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._respond(body=False)

        def do_GET(self) -> None:
            self._respond(body=True)

        def _respond(self, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            site.requests.append((path, self.headers.get("Range", "")))
            site.tokens.append(self.headers.get("Authorization", ""))
            if site.token and site.tokens[-1] != f"Bearer {site.token}":
                self.send_error(401)
            elif path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path not in site.files:
                self.send_error(404)
            else:
                self._send(path, site.files[path], body)

        def _send(self, path: str, data: bytes, body: bool) -> None:
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            begin = 0
            if site.ranges and self.headers.get("Range") and self.headers.get("If-Range", tag) == tag:
                begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.send_header("Content-Type", site.types.get(path, "application/octet-stream"))
            self.send_header("ETag", tag)
            self.send_header("X-Repo-Commit", "0" * 40)
            if path in site.names:
                self.send_header("Content-Disposition", f'attachment; filename="{site.names[path]}"')
            self.end_headers()
            if body:
                rest = data[begin:]
                self.wfile.write(rest[: site.cut.pop(0)] if site.cut else rest)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def repository(site: Site, name: str, files: dict[str, bytes]) -> None:
    """Add a repository to `site`, in the form of the Hugging Face hub."""
    listing = {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in files]}
    for revision in ("main", "0" * 40):
        site.files[f"/api/models/{name}/revision/{revision}"] = json.dumps(listing).encode()
        site.types[f"/api/models/{name}/revision/{revision}"] = "application/json"
        tree = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]
        site.files[f"/api/models/{name}/tree/{revision}"] = json.dumps(tree).encode()
        site.types[f"/api/models/{name}/tree/{revision}"] = "application/json"
        for path, data in files.items():
            site.files[f"/{name}/resolve/{revision}/{path}"] = data
    site.files[f"/api/models/{name}"] = site.files[f"/api/models/{name}/revision/main"]
    site.types[f"/api/models/{name}"] = "application/json"
