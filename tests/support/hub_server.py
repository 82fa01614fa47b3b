"""A Hub on this machine: the requests that huggingface_hub makes to create, push, list and read repositories.

    with serving() as hub:                                        # hub.url is what HF_ENDPOINT has to be
        hub.fail("POST", "/commit/", status=500, times=1)         # the next commit is answered with an error
        ...
        hub.repos["models/me/model"].branches["main"]             # path -> content, as it arrived

Weights and Parquet go through LFS, whose checksum is verified; everything else comes with the commit. A failure has a
status and headers, or 'cut' (the connection is closed without an answer), or 'corrupt' (what arrives is stored wrong).
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".parquet", ".bin", ".png")
WHO = {
    "type": "user",
    "name": "me",
    "fullname": "me",
    "orgs": [],
    "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}},
}


@dataclass
class Repo:
    branches: dict = field(default_factory=lambda: {"main": {}})
    commits: list = field(default_factory=list)  # (branch, summary, paths)
    settings: dict = field(default_factory=dict)

    @property
    def private(self):
        """As asked for when it was made, in the words of huggingface_hub 2 or before."""
        return self.settings.get("visibility") == "private" or bool(self.settings.get("private"))

    def sha(self, branch):
        found = hashlib.sha1(branch.encode())
        for path, content in sorted(self.branches[branch].items()):
            found.update(path.encode() + b"\0" + content)
        return found.hexdigest()

    def at(self, revision):
        """The branch a name or a commit means."""
        names = [name for name in self.branches if revision in (name, self.sha(name))]
        return names[0] if names else None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.log, self.faults = {}, {}, [], []

    def fail(self, method, part, times=1, **how):
        """Answer the next requests whose address contains `part` with a failure."""
        self.faults.append({"method": method, "part": part, "times": times, **how})

    def fault(self, method, path):
        for fault in self.faults:
            if fault["times"] and fault["method"] == method and fault["part"] in path:
                fault["times"] -= 1
                return fault
        return None

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Kept in `hub.log`, not printed."""

    def do(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self.body()
        self.server.log.append((self.command, url.path))
        fault = self.server.fault(self.command, url.path) or {}
        if "cut" in fault:
            self.close_connection = True
            return
        if "status" in fault:
            self.answer(fault["status"], {"error": "injected"}, fault.get("headers", {}))
            return
        self.corrupt = "corrupt" in fault
        for pattern, name in self.routes:
            if match := re.fullmatch(pattern, url.path):
                getattr(self, name)(body, **{key: unquote(found or "") for key, found in match.groupdict().items()})
                return
        self.missing("RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code, headers=None):
        self.answer(404, {"error": code}, {"X-Error-Code": code, **(headers or {})})

    def files(self, kind, repo, revision):
        """Repository and branch of a request, or None after an answer."""
        found = self.server.repos.get(f"{kind}/{repo}")
        branch = found and found.at(revision or "main")
        if branch is None:
            self.missing("RepoNotFound" if found is None else "RevisionNotFound")
            return None
        return found, branch

    def whoami(self, body):
        self.answer(200, WHO)

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = f"{asked.get('type', 'model')}s"
        known = f"{kind}/{name}" in self.server.repos
        self.server.repos.setdefault(f"{kind}/{name}", Repo(settings=asked))
        prefix = "" if kind == "models" else f"{kind}/"
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name})

    def stored(self, kind, repo, revision, content):
        """Headers about where a file is stored; here, in no other place."""
        return {}

    def valid(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, body, kind, repo, revision):
        found = self.server.repos[f"{kind}/{repo}"]
        known = revision in found.branches
        found.branches.setdefault(revision, dict(found.branches["main"]))
        self.answer(409 if known else 200, {})

    def preupload(self, body, kind, repo, revision):
        if self.files(kind, repo, revision):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {name: "lfs" if name.endswith(LFS) else "regular" for name in names}
            files = [{"path": n, "uploadMode": mode[n], "shouldIgnore": False, "oid": None} for n in names]
            self.answer(200, {"files": files})

    def batch(self, body, repo):
        found = []
        for asked in json.loads(body)["objects"]:
            href = f"{self.server.url}/_lfs/{asked['oid']}"
            known = asked["oid"] in self.server.objects
            found.append({**asked, **({} if known else {"actions": {"upload": {"href": href}}})})
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer(200, json.dumps({"transfer": "basic", "objects": found}).encode(), kind)

    def store(self, body, oid):
        if self.corrupt or hashlib.sha256(body).hexdigest() != oid:
            self.answer(422, {"error": "checksum does not match"})
            return
        self.server.objects[oid] = body
        self.answer(200, b"")

    def commit(self, body, kind, repo, revision):
        if not (where := self.files(kind, repo, revision)):
            return
        found, branch = where
        request = None
        if "create_pr" in self.query:
            number = sum(name.startswith("refs/pr/") for name in found.branches) + 1
            request = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{repo}/discussions/{number}"
            found.branches[f"refs/pr/{number}"] = dict(found.branches[branch])
            branch = f"refs/pr/{number}"
        lines = [json.loads(line) for line in body.splitlines()]
        new = dict(found.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"]) + (b"!" if self.corrupt else b"")
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                new.pop(value["path"], None)
        paths = sorted(line["value"]["path"] for line in lines if line["key"] != "header")
        found.branches[branch] = new  # whole or not at all
        found.commits.append((branch, lines[0]["value"]["summary"], paths))
        sha = found.sha(branch)
        told = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"}
        self.answer(200, {**told, "hookOutput": "", "pullRequestUrl": request})

    def info(self, body, kind, repo, revision=""):
        if where := self.files(kind, repo, revision):
            found, branch = where
            names = [{"rfilename": path} for path in sorted(found.branches[branch])]
            about = {
                "private": found.private,
                "gated": getattr(self.server, "gated", {}).get(f"{kind}/{repo}") is not None and "manual",
                "disabled": False,
                "tags": [],
            }
            ids = {"_id": "1", "id": repo, "modelId": repo, "author": "me", "sha": found.sha(branch)}
            when = {"lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0}
            self.answer(200, {**ids, **about, **when, "siblings": names})

    def tree(self, body, kind, repo, revision, path=""):
        if where := self.files(kind, repo, revision):
            content, path = where[0].branches[where[1]], path.strip("/")
            below = {name for name in content if not path or name.startswith(f"{path}/")}
            if path and not below:
                self.missing("EntryNotFound")
                return
            start = len(path) + 1 if path else 0
            deep = self.query.get("recursive", ["false"])[0].lower() == "true"
            shown = [name for name in sorted(below) if deep or "/" not in name[start:]]
            folders = {name[: name.index("/", start)] for name in below if "/" in name[start:]}
            entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
            self.answer(200, entries + [entry(name, content[name]) for name in shown])

    def paths(self, body, kind, repo, revision):
        if where := self.files(kind, repo, revision):
            content = where[0].branches[where[1]]
            plain = "json" in self.headers.get("Content-Type", "")
            names = json.loads(body)["paths"] if plain else parse_qs(body.decode())["paths"]
            self.answer(200, [entry(name, content[name]) for name in names if name in content])

    def refs(self, body, kind, repo):
        found = self.server.repos[f"{kind}/{repo}"]
        all_of = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": found.sha(n)} for n in found.branches]
        self.answer(200, {"branches": all_of, "converts": [], "tags": []})

    def resolve(self, body, kind, repo, revision, path):
        where = self.files((kind or "models").strip("/"), repo, revision)
        if not where:
            return
        content, headers = where[0].branches[where[1]].get(path), {"X-Repo-Commit": where[0].sha(where[1])}
        if content is None:
            self.missing("EntryNotFound", headers)
            return
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers |= self.stored((kind or "models").strip("/"), repo, revision, content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self.answer(200, content, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], headers)


def entry(path, content):
    """A file of a tree, as git names it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(LFS):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "valid"),
    (r"/_lfs/(?P<oid>\w+)", "store"),
    (r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (rf"{REPO}/branch/(?P<revision>[^/]+)", "branch"),
    (rf"{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"{REPO}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", "tree"),
    (rf"{REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
    (rf"{REPO}/refs", "refs"),
    (rf"{REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    (r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


Handler.routes = ROUTES


@contextmanager
def serving(handler=Handler):
    """A running Hub without repositories."""
    hub = Hub(handler)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
