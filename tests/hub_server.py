"""A stand-in for the hub that speaks the part of its API that the package uses: information, file lists, files
in ranges, refusals, uploads.

`huggingface_hub` talks to it over real HTTP. Nothing of the library is replaced, only the address it calls.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def folder_files(folder: Path) -> dict[str, bytes]:
    "The files of a folder by name."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


class Repository:
    "One repository at one commit."

    def __init__(self, kind, name, files, gated=False, private=False, commit=None):
        self.kind, self.name, self.files, self.gated, self.private = kind, name, files, gated, private
        self.commit = commit or hashlib.sha1(repr([kind, name, sorted(files)]).encode()).hexdigest()

    def has(self, revision):
        return revision in (self.commit, "main")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def reply(self, status=200, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def found(self, kind, name, gate=False):
        "The repository, or None after the refusal that the hub would send."
        hub, token = self.server.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = hub.repositories.get((kind, name))
        if hub.down:
            self.reply(hub.down)
        elif token and token not in hub.tokens:
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repository is None or repository.private and not token:
            self.reply(
                404 if token else 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        elif gate and repository.gated and not hub.tokens.get(token):
            self.reply(
                403 if token else 401,
                X_Error_Code="GatedRepo",
                X_Error_Message="Access to this repository is restricted",
            )
        else:
            return repository

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path
        ):
            return self.information(*match.groups())
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        self.reply(404)

    def information(self, kind, name, what, revision):
        repository = self.found(kind[:-1], name)
        if repository is None:
            return
        if revision and not repository.has(revision):
            return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        oids = {file: hashlib.sha1(content).hexdigest() for file, content in repository.files.items()}
        if what == "tree":
            return self.reply(
                body=[
                    {"type": "file", "path": f, "size": len(c), "oid": oids[f]}
                    for f, c in repository.files.items()
                ]
            )
        self.reply(
            body={
                "id": name,
                "sha": repository.commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [
                    {"rfilename": f, "size": len(c), "blobId": oids[f]} for f, c in repository.files.items()
                ],
            }
        )

    def file(self, dataset, name, revision, path):
        repository = self.found("dataset" if dataset else "model", name, gate=True)
        if repository is None:
            return
        if not repository.has(revision):
            return self.reply(404, X_Error_Code="RevisionNotFound")
        if path not in repository.files:
            return self.reply(404, X_Error_Code="EntryNotFound")
        content, hub = repository.files[path], self.server.hub
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[start:], **headers)
        if self.command == "GET" and hub.breaks.get(path, 0) > 0:
            hub.breaks[path] -= 1
            return self.break_off(content, headers)
        self.reply(200, content, **headers)

    def break_off(self, content, headers):
        "Promise the whole file, send half of it, hang up."
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True

    def do_POST(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body, token = (
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
            self.headers.get("Authorization", "").removeprefix("Bearer "),
        )
        hub.requests.append((self.command, path, None))
        if token not in hub.tokens:
            return self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked.get("organization") == "others":
                return self.reply(
                    403, X_Error_Message="You don't have the rights to create a model under this namespace"
                )
            hub.repositories.setdefault(
                ("model", name),
                Repository(
                    "model",
                    name,
                    {},
                    private=bool(asked.get("private") or asked.get("visibility") == "private"),
                ),
            )
            return self.reply(body={"url": f"{hub.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            return self.reply(
                body={
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if path == "/api/validate-yaml":
            return self.reply(body={"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub.repositories["model", match[1]].files[line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            return self.reply(
                body={
                    "success": True,
                    "commitOid": "c" * 40,
                    "commitUrl": f"{hub.url}/{match[1]}/commit/{'c' * 40}",
                    "hookOutput": "",
                    "pullRequestUrl": None,
                }
            )
        self.reply(404)


class HubServer:
    "The server, running in a thread of its own; `repositories` is what it has, `requests` what it was asked."

    def __init__(self):
        self.repositories, self.requests = {}, []
        # token -> whether its account accepted the licences
        self.tokens = {"hf_with_access": True, "hf_without_access": False}
        self.breaks, self.down = {}, 0  # file -> how often it breaks off; status that every request gets
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind, name, files, **options) -> Repository:
        "Put a folder, or files by name, on the hub."
        repository = Repository(
            kind, name, files if isinstance(files, dict) else folder_files(files), **options
        )
        self.repositories[kind, name] = repository
        return repository

    def close(self):
        self.server.shutdown()
        self.server.server_close()
