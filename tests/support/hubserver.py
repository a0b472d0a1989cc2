"""A small server that speaks as much of the hub's HTTP interface as the real clients ask for."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40
Repositories = Mapping[str, Mapping[str, bytes]]


@dataclass
class Written:
    """What clients wrote: repository ("models/org/name") → its files, and whether it is private;
    large files that were uploaded by their SHA-256; how many uploads and commits there were.

    fail_after: uploads that succeed before all others are refused; None: none is.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    commits: list[str] = field(default_factory=list)
    fail_after: int | None = None
    large: int = 1 << 16
    """Files of more bytes go as large ones."""


@contextmanager
def serve(repositories: Repositories, written: Written | None = None) -> Iterator[str]:
    """Serve `{"models/org/name" | "datasets/org/name": {file: content}}`; yields the address.

    A repository whose name ends in -gated answers as a gated one. With `written` clients may make
    model repositories and write to them.
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
            elif written and api and repository in written.files:
                name = repository.split("/", 1)[1]
                about = {
                    "id": name,
                    "sha": COMMIT,
                    "private": written.private[repository],
                    "siblings": [{"rfilename": n} for n in written.files[repository]],
                }
                self.answer(200, json.dumps(about).encode(), {})  # fmt: skip
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

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            content, path = self.body(), self.path.split("?")[0].strip("/")
            if written is None or not self.headers.get("Authorization"):
                self.answer(401, b"", {})
            elif path == "api/repos/create":
                self.create(json.loads(content))
            elif path == "api/validate-yaml":
                self.answer(200, b'{"errors": [], "warnings": []}', {})
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.batch(json.loads(content)["objects"])
            else:
                repository = "/".join(path.removeprefix("api/").split("/")[:3])
                if "/preupload/" in path:
                    self.preupload(json.loads(content)["files"])
                else:
                    self.commit(repository, [json.loads(line) for line in content.splitlines()])

        def create(self, asked: dict[str, Any]) -> None:
            assert written is not None
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            written.files[f"models/{name}"] = {}
            written.private[f"models/{name}"] = private
            url = f"http://{self.headers['Host']}/{name}"
            self.answer(200, json.dumps({"url": url, "name": name}).encode(), {})

        def preupload(self, files: list[dict[str, Any]]) -> None:
            assert written is not None
            told = [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if one["size"] > written.large else "regular"}
                for one in files
            ]  # fmt: skip
            self.answer(200, json.dumps({"files": told}).encode(), {})

        def batch(self, objects: list[dict[str, Any]]) -> None:
            assert written is not None
            host = f"http://{self.headers['Host']}"
            for one in objects:
                if one["oid"] not in written.blobs:
                    one["actions"] = {"upload": {"href": f"{host}/blobs/{one['oid']}"}}
            told = {"transfer": "basic", "objects": objects}
            self.answer(200, json.dumps(told).encode(),
                        {"Content-Type": "application/vnd.git-lfs+json"})  # fmt: skip

        def do_PUT(self) -> None:
            assert written is not None
            content, oid = self.body(), self.path.rpartition("/")[2]
            if written.fail_after is not None and written.uploads >= written.fail_after:
                self.answer(400, b"", {})
                return
            written.uploads += 1
            written.blobs[oid] = content
            self.answer(200, b"", {})

        def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
            assert written is not None
            files = written.files[repository]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    written.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = written.blobs[value["oid"]]
            url = f"http://{self.headers['Host']}/{repository.split('/', 1)[1]}/commit/{COMMIT}"
            told = {"commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
            self.answer(200, json.dumps(told).encode(), {})

        def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
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
