"""A small Hugging Face hub on this machine: repositories with commits, and a branch or tag that can move."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECOND_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class FakeHub:
    """What the hub holds.

    repositories: `models/tiny/llama` -> commit -> file name -> content. revisions: branches and tags -> commit, for
    all repositories; they may be changed at any time. address: of the server, once it runs.
    """

    repositories: Mapping[str, Mapping[str, Mapping[str, bytes]]]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT})
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that its clients use."""

    hub: FakeHub

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        of_api = parts[0] == "api"
        parts = parts[1:] if of_api else parts
        kind, *parts = parts if parts[0] in ("models", "datasets") else ["models", *parts]
        commits = self.hub.repositories.get("/".join([kind, *parts[:2]]))
        if commits is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        asked = parts[3] if parts[2:3] in (["revision"], ["resolve"], ["tree"]) else "main"
        commit = self.hub.revisions.get(asked, asked)
        if commit not in commits:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        self.answer_commit(parts, commit, commits[commit], of_api=of_api)

    do_HEAD = do_GET

    def answer_commit(self, parts: list[str], commit: str, files: Mapping[str, bytes], *, of_api: bool) -> None:
        if of_api and parts[2:3] in ([], ["revision"]):
            listed = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": "/".join(parts[:2]), "sha": commit, "siblings": listed}).encode())
        elif of_api and parts[2:3] == ["tree"] and not parts[4:]:
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": commit} for name in files]
            self.answer(200, json.dumps(tree).encode())
        elif parts[2:3] == ["resolve"] and parts[-1] in files:
            etag = f'"{commit}-{parts[-1]}"'
            self.answer(200, files[parts[-1]], {"ETag": etag, "X-Repo-Commit": commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output free of requests."""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """A context in which the hub answers at `hub.address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
