"""A hub on this machine: a server that speaks as much of its HTTP interface as downloads and uploads of models use.

May be changed here: what the server knows of that interface.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

OWNER = "owner"
"""Who has the token; owns repositories that are named without an owner."""


@dataclasses.dataclass
class Hub:
    """Repositories, by `owner/name`, then by revision: folders.

    Attributes:
        token: which private repositories ask for.
        private: repositories that are hidden from those who do not give it.
        gated: repositories whose files are not given to anyone.
        fetched: repository and path of each file that was downloaded.
        uploads: folder in which repositories are made by those who give the token; None if that is not possible.
    """

    url: str
    uploads: Path | None = None
    repositories: dict[str, dict[str, Path]] = dataclasses.field(default_factory=dict)
    token: str = "hf_token_of_the_tests"
    private: set[str] = dataclasses.field(default_factory=set)
    gated: set[str] = dataclasses.field(default_factory=set)
    fetched: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def fetched_from(self, repository: str) -> list[str]:
        return sorted(path for name, path in self.fetched if name == repository)


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """Of a process whose hub this is; the client reads it when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serves until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def folder(self, name: str, revision: str) -> Path | None:
            if name not in hub.repositories or (
                name in hub.private and self.headers.get("Authorization") != f"Bearer {hub.token}"
            ):
                self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
                return None
            if name in hub.gated:
                self.refuse(403, "GatedRepo")
                return None
            revisions = hub.repositories[name]
            by_commit = {commit(folder): folder for folder in revisions.values()}
            found = revisions.get(revision) or by_commit.get(revision)
            if found is None:
                self.refuse(404, "RevisionNotFound")
            return found

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name = "/".join(parts[2:4])
                folder = self.folder(name, parts[5] if len(parts) > 5 else "main")
                if folder is not None:
                    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                    files = [str(file.relative_to(folder)) for file in found]
                    listed: object = {
                        "id": name,
                        "sha": commit(folder),
                        "siblings": [{"rfilename": file} for file in files],
                    }
                    if parts[4:5] == ["tree"]:  # which the client asks for from version 2 on
                        listed = [
                            {
                                "type": "file",
                                "path": path,
                                "size": file.stat().st_size,
                                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                            }
                            for path, file in zip(files, found, strict=True)
                        ]
                    self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
                return
            name, path = "/".join(parts[:2]), "/".join(parts[4:])
            folder = self.folder(name, parts[3]) if parts[2:3] == ["resolve"] else None
            if folder is None:
                return
            if not (folder / path).is_file():
                self.refuse(404, "EntryNotFound")
                return
            body = (folder / path).read_bytes()
            if self.command == "GET":
                hub.fetched.append((name, path))
            self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=commit(folder))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts == ["api", "validate-yaml"]:  # of a model card
                self.answer_json({"errors": [], "warnings": []})
            elif hub.uploads is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(401, b'{"error": "Invalid username or password."}')
            elif parts == ["api", "repos", "create"]:
                self.create(json.loads(body))
            elif parts[4] == "preupload":  # which asks how each file is to come; here: in the commit itself
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                self.answer_json({"files": files})
            elif parts[4] == "commit":
                name = "/".join(parts[2:4])
                for line in body.splitlines():
                    self.change(hub.repositories[name]["main"], **json.loads(line))
                self.answer_json({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1"})

        def create(self, wanted: dict[str, str | bool]) -> None:
            assert hub.uploads is not None
            name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            if name in hub.repositories:
                self.answer(409, json.dumps({"error": "exists", "url": f"{hub.url}/{name}"}).encode())
                return
            hub.repositories[name] = {"main": hub.uploads / name}
            (hub.uploads / name).mkdir(parents=True)
            if wanted.get("private") or wanted.get("visibility") == "private":  # the latter: version 1 of the client
                hub.private.add(name)
            self.answer_json({"url": f"{hub.url}/{name}"})

        def change(self, folder: Path, key: str, value: dict[str, str]) -> None:
            """A line of a commit."""
            if key == "file":
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif key == "deletedFile":
                (folder / value["path"]).unlink()

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
