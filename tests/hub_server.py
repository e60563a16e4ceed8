"""A Hub of one's own for the tests: the HTTP endpoints that huggingface_hub calls, answered from memory.

Files are stored as on the Hub: small text as git blobs, the rest by LFS on another host name. Commits, branches,
ETags, byte ranges, redirects and error codes are as there, so that unmodified clients can push and pull with
`HF_ENDPOINT`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_owner"
OWNER = "org"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".mp4")
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "other"}
REPO_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repo:
    """Branches point to commits; a commit is the files it holds."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        content = "".join(f"{path}{files[path].etag}" for path in sorted(files))
        oid = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **headers}


class LocalHub:
    """
    The server, in a thread of its own: `with LocalHub() as hub`.

    Attributes:
        endpoint (`str`): for `HF_ENDPOINT`.
        repos (`dict[tuple[str, str], Repo]`): by kind ("models", "datasets") and id.
        drop_after (`dict[str, int]`): the next download of a file with this name is cut off after so many bytes.
        downloads (`list[tuple[str, str | None]]`): file name and Range header of every GET of a file's content.
        received (`int`): bytes of the bodies of all requests.

    Args:
        may_upload (`Callable[[str, str, bytes], bool]`, *optional*): asked with kind, path and content of every file
            of a commit; the commit is refused where it says no.
    """

    def __init__(self, may_upload: Callable[[str, str, bytes], bool] = lambda kind, path, content: True):
        self.may_upload = may_upload
        self.received = 0
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.drop_after: dict[str, int] = {}
        self.downloads: list[tuple[str, str | None]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Another host name, as the Hub's storage: clients must not hand it their token.
        self.storage_endpoint = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """What a branch holds, without the file that the Hub itself puts into every repository."""
        repo = self.repos[kind, repo_id]
        files = repo.commits[repo.branches[branch]]
        return {path: blob.content for path, blob in sorted(files.items()) if path != ".gitattributes"}


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def log_message(self, *_):
        pass

    def _answer(self, method: str):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.received += len(self.body)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for methods, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and method in methods:
                    arguments = {
                        name: None if text is None else unquote(text) for name, text in match.groupdict().items()
                    }
                    # Only what changes something waits its turn: a client may hold one download open during another.
                    with self.hub.lock if method in ("POST", "PUT") else nullcontext():
                        reply = action(self, **arguments)
                    break
            else:
                raise HubError(404, None, f"no such page: {method} {url.path}")
        except HubError as error:
            self._send(error.status, json.dumps({"error": error.message}).encode(), error.headers)
        else:
            if reply is not None:
                self._send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    # Who asks, and for what

    def _is_owner(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return token == TOKEN

    def _check_write(self):
        if not self._is_owner():
            raise HubError(401, None, "Invalid username or password.")

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        is_owner = self._is_owner()
        if repo is None or (repo.private and not is_owner):
            raise HubError(404 if is_owner else 401, "RepoNotFound", "Repository not found")
        return repo

    def _revision(self, repo: Repo, revision: str | None) -> tuple[str, dict[str, Blob]]:
        oid = repo.branches.get(revision or "main", revision)
        if oid not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    # Accounts and cards

    def whoami(self):
        self._check_write()
        return {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self):
        request = json.loads(self.body)
        errors = _card_errors(request["content"], request["repoType"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    # Repositories

    def create_repo(self):
        self._check_write()
        request = json.loads(self.body)
        kind = request.get("type", "model") + "s"
        repo_id = f"{request['organization'] or OWNER}/{request['name']}"
        if not repo_id.startswith(f"{OWNER}/"):
            raise HubError(403, None, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        answer = {"url": url, "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.hub.repos:
            answer["error"] = f"You already created this {kind[:-1]} repo"
            self._send(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return None
        repo = Repo(private=request.get("visibility") == "private" or bool(request.get("private")))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit("main", {".gitattributes": Blob(attributes.encode(), is_lfs=False)})
        self.hub.repos[kind, repo_id] = repo
        return answer

    def repo_info(self, kind, repo_id, revision=None):
        repo = self._repo(kind, repo_id)
        oid, files = self._revision(repo, revision)
        return {
            "_id": "0" * 24, "id": repo_id, "author": repo_id.split("/")[0], "sha": oid, "private": repo.private,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "createdAt": "2025-01-01T00:00:00.000Z", "lastModified": "2025-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }  # fmt: skip

    def refs(self, kind, repo_id):
        branches = self._repo(kind, repo_id).branches
        return {
            "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches.items()],
            "tags": [],
            "converts": [],
        }

    def create_branch(self, kind, repo_id, branch):
        self._check_write()
        repo = self._repo(kind, repo_id)
        if branch in repo.branches:
            raise HubError(409, None, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint")
        repo.branches[branch] = self._revision(repo, start)[0]
        return {}

    def tree(self, kind, repo_id, revision, path=None):
        _, files = self._revision(self._repo(kind, repo_id), revision)
        below = f"{path}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = {}
        for name in sorted(files):
            if not name.startswith(below):
                continue
            parts = name[len(below) :].split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(len(parts), 2)):
                folder = below + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = _file_entry(name, files[name])
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        return list(entries.values())

    def paths_info(self, kind, repo_id, revision):
        _, files = self._revision(self._repo(kind, repo_id), revision)
        entries = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in files:
                entries.append(_file_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        return entries

    # Upload: which files go by LFS, their content, and the commit that names them

    def preupload(self, kind, repo_id, revision):
        self._check_write()
        _, files = self._revision(self._repo(kind, repo_id), revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = files[file["path"]].etag
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, kind, repo_id):
        self._check_write()
        self._repo(kind or "models", repo_id)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.storage:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.storage_endpoint}/storage/{item['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/verify"},
                }
        return {"transfer": "basic", "objects": objects}

    def put_storage(self, oid):
        if "Authorization" in self.headers:
            raise HubError(400, None, "Only one auth mechanism allowed")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "the content does not have this checksum")
        self.hub.storage[oid] = self.body
        return {}

    def verify(self):
        self._check_write()
        request = json.loads(self.body)
        if len(self.hub.storage.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, None, "the object was not uploaded")
        return {}

    def commit(self, kind, repo_id, revision):
        self._check_write()
        repo = self._repo(kind, repo_id)
        if revision not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent, files = self._revision(repo, revision)
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (None, parent):
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            if key in ("file", "lfsFile"):
                is_lfs = key == "lfsFile"
                content = self.hub.storage[value["oid"]] if is_lfs else base64.b64decode(value["content"])
                if not self.hub.may_upload(kind, value["path"], content):
                    raise HubError(403, None, f"{value['path']} must not be uploaded")
                files[value["path"]] = Blob(content, is_lfs)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        oid = repo.commit(revision, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    # Download

    def resolve(self, kind, repo_id, revision, path):
        oid, files = self._revision(self._repo(kind or "models", repo_id), revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": oid})
        blob = files[path]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"'}
        if blob.is_lfs:
            headers |= {
                "Location": f"{self.hub.storage_endpoint}/storage/{blob.sha256}?name={path}",
                "X-Linked-Etag": f'"{blob.etag}"',
                "X-Linked-Size": str(len(blob.content)),
            }
            self._send(302, b"", headers)
        else:
            self._send_content(path, blob.content, headers)

    def get_storage(self, oid):
        if "Authorization" in self.headers:
            raise HubError(400, None, "Only one auth mechanism allowed")
        content = self.hub.storage[oid]
        self._send_content(self.query["name"][0], content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_content(self, path: str, content: bytes, headers: dict[str, str]):
        wanted = self.headers.get("Range")
        cut = None
        if self.command == "GET":
            self.hub.downloads.append((path, wanted))
            cut = self.hub.drop_after.pop(path, None)
        if wanted is None:
            return self._send(200, content, headers, cut)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers, cut)


def _file_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return entry


def _card_errors(content: str, kind: str) -> list[str]:
    """What the Hub refuses in the metadata of a card."""
    block = re.match(r"\s*---\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    data = yaml.safe_load(block.group(1)) if block else None
    if not isinstance(data, dict):
        return ["the card has no metadata block"]
    errors = []
    if "license" in data and data["license"] not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for name in ("base_model", "datasets") if kind == "model" else ():
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not REPO_NAME.fullmatch(value):
                errors.append(f'"{name}" with value "{value}" is not valid')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (isinstance(model["name"], str) and result["task"]["type"] and result["dataset"]["type"]):
                errors.append('"model-index" lacks a name, task or dataset')
            if not all(metric["type"] and metric["value"] is not None for metric in result["metrics"]):
                errors.append('"model-index" has a metric without type or value')
    return errors


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), r"/api/repos/create", _Handler.create_repo),
    (("GET",), _API, _Handler.repo_info),
    (("GET",), _API + r"/revision/(?P<revision>[^/]+)", _Handler.repo_info),
    (("GET",), _API + r"/refs", _Handler.refs),
    (("POST",), _API + r"/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    (("POST",), _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("POST",), _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), _PAGE + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), r"/verify", _Handler.verify),
    (("PUT",), r"/storage/(?P<oid>\w+)", _Handler.put_storage),
    (("GET", "HEAD"), r"/storage/(?P<oid>\w+)", _Handler.get_storage),
    (("GET", "HEAD"), _PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
