"""A Hub on loopback: real HTTP, with the protocol that huggingface_hub's client speaks without Xet, kept in memory."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GOOD_TOKEN = "hf_good"
USERS = {
    GOOD_TOKEN: dict(name="me", orgs=[dict(name="lab", roleInOrg="write"), dict(name="club", roleInOrg="read")]),
    "hf_reader": dict(name="me", orgs=[], role="read"),
    "hf_other": dict(name="other", orgs=[]),
    "hf_fine": dict(
        name="me",
        orgs=[],
        role="fineGrained",
        scoped=[{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}],
    ),
}


@dataclass
class Commit:
    oid: str
    parent: str | None
    files: dict[str, bytes]
    message: str


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]


@dataclass
class Fault:
    """What happens to the next requests that match.

    A status in place of an answer, the connection "cut" in the middle, the "answer lost", the content "corrupt", or
    a function that is called first.
    """

    method: str
    path: str
    what: int | str | Callable[[], None]
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server and all that it holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.content_endpoint = f"http://localhost:{self.server_address[1]}"  # another host, as the real Hub's is
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def fail(self, method: str, path: str, what: int | str | Callable[[], None], times: int = 1, **headers: str):
        self.faults.append(Fault(method, path, what, times, headers))

    def create(self, repo_id: str, private: bool = False) -> Repository:
        initial = Commit(hashlib.sha1(repo_id.encode()).hexdigest(), None, {".gitattributes": b""}, "initial commit")
        self.repositories[repo_id] = Repository(private, {"main": [initial]})
        return self.repositories[repo_id]

    def add_commit(self, repo_id: str, branch: str, files: dict[str, bytes | None], message: str) -> Commit:
        history = self.repositories[repo_id].branches[branch]
        merged = {k: v for k, v in (history[-1].files | files).items() if v is not None}
        oid = hashlib.sha1(f"{repo_id}{branch}{len(history)}{sorted(merged)}".encode()).hexdigest()
        history.append(Commit(oid, history[-1].oid, merged, message))
        return history[-1]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[branch][-1].files

    def commits(self, repo_id: str, branch: str = "main") -> int:
        """Commits after the initial one."""
        return len(self.repositories[repo_id].branches[branch]) - 1

    def count(self, method: str, path: str) -> int:
        """Requests so far whose path matches."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        self.path_parts, self.query = unquote(url.path), parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append((method, self.path_parts))
            fault = next((f for f in self.server.faults if f.method == method and re.search(f.path, self.path)), None)
            if fault is not None:
                fault.times -= 1
                if fault.times == 0:
                    self.server.faults.remove(fault)
        self.fault = fault.what if fault else None
        if self.fault == "cut" and method in ("PUT", "POST"):
            self.rfile.read(min(1000, int(self.headers["Content-Length"])))
            return self._cut()
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if callable(self.fault):
            self.fault()
        try:
            if isinstance(self.fault, int):
                raise _Refused(self.fault, "", "try later")
            for route_method, pattern, handler in _ROUTES:
                match = re.fullmatch(pattern, self.path_parts)
                if match and route_method == method:
                    return handler(self, *match.groups())
            raise _Refused(404, "", f"no route for {method} {self.path_parts}")
        except _Refused as refused:
            extra = {"X-Error-Code": refused.code} if refused.code else {}
            extra |= fault.headers if fault else {}
            content = json.dumps({"error": refused.message or refused.code}).encode()
            self._answer(content, refused.status, extra | {"X-Error-Message": refused.message or refused.code})
        return None

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.fault == "answer lost":
            return self._cut()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._cut()
        self.wfile.write(content)
        return None

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status)

    def _user(self) -> dict:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if not token:
            raise _Refused(401, "", "Invalid username or password.")
        return USERS[token]

    def _may_write(self, repo_id: str) -> None:
        user, owner = self._user(), repo_id.partition("/")[0]
        owners = {user["name"]} | {org["name"] for org in user["orgs"] if org["roleInOrg"] != "read"}
        if owner not in owners or user.get("role") == "read":
            raise _Refused(403, "", f"You don't have the rights to write to {repo_id}")

    def _repository(self, repo_id: str) -> Repository:
        if self.headers.get("Authorization"):
            self._user()  # the Hub refuses a wrong token even where none is needed
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            raise _Refused(
                401 if not self.headers.get("Authorization") else 404, "RepoNotFound", "Repository not found"
            )
        return repository

    def _commit_at(self, repo_id: str, revision: str) -> Commit:
        repository = self._repository(repo_id)
        if revision in repository.branches:
            return repository.branches[revision][-1]
        for history in repository.branches.values():
            for commit in history:
                if commit.oid == revision:
                    return commit
        raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def whoami(self) -> None:
        user = self._user()
        token = {"displayName": "test", "role": user.get("role", "write")}
        if "scoped" in user:
            token["fineGrained"] = {"scoped": user["scoped"]}
        self._json(
            {
                "type": "user",
                "name": user["name"],
                "orgs": user["orgs"],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self._user()['name']}/{wanted['name']}"
        self._may_write(repo_id)
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.server.create(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self._json({"url": url, "name": repo_id})

    def list_models(self) -> None:
        if self.headers.get("Authorization"):
            self._user()
        author, search = self.query.get("author", [""])[0], self.query.get("search", [""])[0]
        self._json([{"id": i} for i in sorted(self.server.repositories) if i.startswith(f"{author}/") and search in i])

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repository, commit = self._repository(repo_id), self._commit_at(repo_id, revision)
        siblings = []
        for name, content in commit.files.items():
            item = {"rfilename": name}
            if "blobs" in self.query:
                item |= {"size": len(content), "blobId": git_oid(content)}
                if name.endswith(".safetensors"):
                    digest = hashlib.sha256(content).hexdigest()
                    item["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(item)
        self._json({"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str) -> None:
        entries = []
        for name, content in self._commit_at(repo_id, revision).files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else {}
        errors = [{"message": f'"{k}" is required'} for k in ("license",) if k not in metadata]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo_id: str, branch: str) -> None:
        self._may_write(repo_id)
        branches = self._repository(repo_id).branches
        if branch in branches:
            return self._json({"error": "Reference already exists"}, 409)
        branches[branch] = [branches["main"][-1]]
        return self._json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self._commit_at(repo_id, revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors")
            content = commit.files.get(file["path"])
            known = content is not None
            oid = (hashlib.sha256(content).hexdigest() if large else git_oid(content)) if known else None
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": oid} if known else {}))
        self._json({"files": modes})

    def lfs_batch(self, repo_id: str) -> None:
        self._repository(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            item = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.endpoint}/lfs-verify"},
                }
            objects.append(item)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "the content does not have this hash")
        self.server.objects[oid] = self.body
        self._answer(b"")

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refused(404, "", "no such object")
        self._json({})

    def lfs_get(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise _Refused(400, "", "the token must not be sent to the host of the files")
        self._content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, revision: str) -> None:
        with self.server.lock:
            create_pr = self.query.get("create_pr") == ["1"]
            if not create_pr:
                self._may_write(repo_id)
            lines = [json.loads(line) for line in self.body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            head = self._commit_at(repo_id, revision)
            if header.get("parentCommit") not in (None, head.oid):
                raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files: dict[str, bytes | None] = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files[value["path"]] = None
            branches = self._repository(repo_id).branches
            branch, answer = revision, {}
            if create_pr:
                number = 1 + sum(name.startswith("refs/pr/") for name in branches)
                branch = f"refs/pr/{number}"
                branches[branch] = [head]
                answer = {"pullRequestUrl": f"{self.server.endpoint}/{repo_id}/discussions/{number}"}
            commit = self.server.add_commit(repo_id, branch, files, header["summary"])
            url = f"{self.server.endpoint}/{repo_id}/commit/{commit.oid}"
            self._json({"success": True, "commitOid": commit.oid, "commitUrl": url, **answer})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo_id, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return self._answer(b"", 404, headers | {"X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        if path.endswith(".safetensors"):
            oid = hashlib.sha256(content).hexdigest()
            self.server.objects[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return self._answer(b"", 302, headers | {"Location": f"{self.server.content_endpoint}/lfs/{oid}"})
        return self._content(content, headers | {"ETag": f'"{git_oid(content)}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        if self.fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream"} | headers
        if wanted and int(wanted[1]):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._answer(content[start:], 206, headers)
        return self._answer(content, 200, headers)


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/models", _Handler.list_models),
    ("GET", f"/api/models/{_ID}", _Handler.model_info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.model_info),
    ("GET", f"/api/models/{_ID}/tree/(.+)", _Handler.tree),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", _Handler.lfs_put),
    ("GET", "/lfs/(.+)", _Handler.lfs_get),
    ("HEAD", "/lfs/(.+)", _Handler.lfs_get),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("POST", f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    *((method, f"/{_ID}/resolve/(refs/pr/\\d+|[^/]+)/(.+)", _Handler.resolve) for method in ("HEAD", "GET")),
]
