"""A server that speaks as much of the hub's protocol as a download and an upload need.

Repositories are dicts of files. Weights are LFS files: their bytes come from a second address, as
they do from the hub's content network, which must never see a token. Faults are settings.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin")


@dataclass
class Repo:
    """One repository; `commit` follows from what is in it."""

    files: dict[str, bytes]
    token: str | None = None
    """Whoever does not send this one gets what the hub says of private models."""
    gated: bool = False
    listed: dict[str, bytes] = field(default_factory=dict)
    """Contents that the tree describes in place of those that are sent."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, contents in sorted(self.files.items()):
            digest.update(f"{name} {_oid(contents)}\n".encode())
        return digest.hexdigest()


@dataclass
class Hub:
    """The server's state, and what it was asked.

    Attributes:
        cut_after: file -> bytes after which the connection is cut, one entry an answer.
        no_ranges: whether it answers as though it had never heard of ranges.
        refuse_tokens: whether every token is expired.
        status: if set, what every request is answered with.
        edit_tree: changes every listing before it is sent.
        sent: (address, method, path, range, number of bytes sent) of each request.
        tokens_at_cdn: the Authorization headers that the content network saw.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    no_ranges: bool = False
    refuse_tokens: bool = False
    status: int | None = None
    edit_tree: Callable[[list[dict[str, Any]]], object] | None = None
    sent: list[tuple[str, str, str, str, int]] = field(default_factory=list)
    tokens_at_cdn: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""
    cdn: str = ""

    def add(self, name: str, folder: Path, **settings: Any) -> Repo:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.repos[name] = Repo(files, **settings)
        return self.repos[name]

    def bytes_sent(self, ending: str) -> int:
        return sum(one[4] for one in self.sent if one[2].endswith(ending))


def _oid(contents: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def _handler(hub: Hub, address: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        # -- answers -------------------------------------------------------------------------------

        def _answer(self) -> None:
            num_bytes = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(num_bytes)
            path = unquote(urlsplit(self.path).path)
            if hub.status:
                return self._refuse(hub.status, "")
            if address == "cdn":
                hub.tokens_at_cdn += filter(None, [self.headers.get("Authorization")])
                return self._cdn(path)
            return self._hub(path)

        def _cdn(self, path: str) -> None:
            name, sha256 = path.strip("/").split("/")[-2:]
            if self.command == "PUT":
                hub.objects[sha256] = self.body
                return self._send(200, b"")
            return self._file(hub.objects[sha256], name, {})

        def _hub(self, path: str) -> None:
            if hub.refuse_tokens and self.headers.get("Authorization"):
                said = "Invalid credentials in Authorization header"
                return self._refuse(401, "", said + str(self.headers["Authorization"]))
            if path in ("/api/repos/create", "/api/validate-yaml"):
                return self._create() if path.endswith("create") else self._json({"errors": []})
            if path == "/api/whoami-v2":
                return self._json({"name": "org", "type": "user", "auth": {}})
            match = re.match(
                r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+?)(?P<git>\.git)?(?:/(?P<rest>.*))?$", path
            )
            repo = hub.repos.get(match["repo"]) if match else None
            if match is None or repo is None:
                return self._refuse(
                    404 if self.headers.get("Authorization") else 401, "RepoNotFound"
                )
            sent = self.headers.get("Authorization")
            if repo.token and sent != f"Bearer {repo.token}":
                return self._refuse(404 if sent else 401, "RepoNotFound")
            kind, _, rest = (match["rest"] or "").partition("/")
            if repo.gated and kind == "resolve":
                return self._refuse(403, "GatedRepo")
            if self.command == "POST":
                return self._post(match["repo"], repo, match["rest"] or "")
            revision, _, file = rest.partition("/")
            if kind and revision not in ("main", repo.commit):
                return self._refuse(404, "RevisionNotFound")
            if kind in ("", "revision"):
                return self._json({"id": match["repo"], "sha": repo.commit, "siblings": []})
            if kind == "tree":
                tree = [self._entry(repo, name) for name in sorted(repo.files)]
                if hub.edit_tree:
                    hub.edit_tree(tree)
                return self._json(tree)
            if file not in repo.files:
                return self._refuse(404, "EntryNotFound")
            return self._resolve(repo, file)

        def _entry(self, repo: Repo, name: str) -> dict[str, Any]:
            contents = repo.listed.get(name, repo.files[name])
            entry = {"type": "file", "oid": _oid(contents), "size": len(contents), "path": name}
            if name.endswith(LFS_ENDINGS):
                sha256 = hashlib.sha256(contents).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(contents), "pointerSize": 130}
            return entry

        def _resolve(self, repo: Repo, name: str) -> None:
            contents = repo.files[name]
            entry = self._entry(repo, name)
            headers = {"X-Repo-Commit": repo.commit}
            if not name.endswith(LFS_ENDINGS):
                return self._file(contents, name, headers | {"ETag": f'"{entry["oid"]}"'})
            sha256 = hashlib.sha256(contents).hexdigest()
            hub.objects[sha256] = contents
            headers |= {
                "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
                "X-Linked-Size": str(entry["lfs"]["size"]),
                "Location": f"{hub.cdn}/{name}/{sha256}",
            }
            return self._send(302, b"", headers)

        def _file(self, contents: bytes, name: str, headers: Mapping[str, str]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked is None or hub.no_ranges:
                return self._send(200, contents, headers, name)
            start, stop = int(asked[1]), min(int(asked[2] or 2**62) + 1, len(contents))
            if start >= len(contents):
                return self._send(416, b"", headers)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(contents)}"}
            return self._send(206, contents[start:stop], headers, name)

        # -- uploads -------------------------------------------------------------------------------

        def _create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'org'}/{asked['name']}"
            if not self.headers.get("Authorization"):
                return self._refuse(401, "")
            hub.repos.setdefault(name, Repo({}))
            return self._json({"url": f"{hub.endpoint}/{name}", "name": name})

        def _post(self, name: str, repo: Repo, rest: str) -> None:
            if not self.headers.get("Authorization"):
                return self._refuse(401, "")
            if rest.startswith("preupload"):
                asked = json.loads(self.body)["files"]
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(LFS_ENDINGS) else "regular",
                        "shouldIgnore": False,
                    }
                    for one in asked
                ]
                return self._json({"files": modes})
            if rest == "info/lfs/objects/batch":
                objects = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{hub.cdn}/upload/{one['oid']}"}},
                    }
                    for one in json.loads(self.body)["objects"]
                ]
                return self._json({"transfer": "basic", "objects": objects})
            if rest.startswith("commit"):
                return self._commit(name, repo)
            return self._refuse(404, "")

        def _commit(self, name: str, repo: Repo) -> None:
            import base64

            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.endpoint}/{name}/commit/{repo.commit}"
            return self._json({"commitUrl": url, "commitOid": repo.commit, "success": True})

        # -- sending -------------------------------------------------------------------------------

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str, message: str = "") -> None:
            headers = {"X-Error-Code": code} if code else {}
            self._send(status, b"{}", headers | ({"X-Error-Message": message} if message else {}))

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, name: str = ""
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            num_bytes = 0
            if self.command != "HEAD":
                cuts = hub.cut_after.get(name)
                num_bytes = min(cuts.pop(0), len(body)) if cuts else len(body)
                self.wfile.write(body[:num_bytes])
            asked = self.headers.get("Range") or ""
            hub.sent.append((address, self.command, name or self.path, asked, num_bytes))
            if self.command != "HEAD" and num_bytes < len(body):
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub, and its content network at another address, until the block ends."""
    hub = Hub()
    servers = []
    for address in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, address))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{one.server_address[1]}" for one in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
