"""A small server that speaks as much of the hub's HTTP interface as the real clients ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40
Repositories = Mapping[str, Mapping[str, bytes]]


@contextmanager
def serve(repositories: Repositories) -> Iterator[str]:
    """Serve `{"models/org/name" | "datasets/org/name": {file: content}}`; yields the address.

    A repository whose name ends in -gated answers as a gated one.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api").strip("/")
            api = self.path.startswith("/api/")
            path = path if api or path.startswith("datasets/") else f"models/{path}"
            repository = "/".join(path.split("/")[:3])
            rest = path.split("/")[3:]
            if repository.endswith("-gated"):
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif repository not in repositories:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif api:
                self.api(repositories[repository], repository, rest)
            else:
                self.file(repositories[repository], "/".join(rest[2:]))

        def api(self, files: Mapping[str, bytes], repository: str, rest: list[str]) -> None:
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha1(content)}
                    for name, content in files.items()
                    if len(rest) < 3
                ]
                self.answer(200, json.dumps(entries).encode(), {})
            else:
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repository.split("/", 1)[1], "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(about).encode(), {})

        def file(self, files: Mapping[str, bytes], name: str) -> None:
            if name not in files:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = files[name]
            headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": COMMIT}
            wanted = self.headers.get("Range")
            if wanted is None:
                self.answer(200, content, headers)
                return
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.answer(206, content[start : end + 1], headers)

        def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
