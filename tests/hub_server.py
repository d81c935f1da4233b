"""A small Hugging Face Hub on the loopback interface: model repositories, commits, large files, and faults on demand.

    with HubServer(folder) as hub:
        hub.fail("PUT", "/_lfs/", cut_after=1000)     # the next upload of a large file breaks off after 1,000 bytes
        run(script, env=hub.environment())            # set before huggingface_hub is imported
        hub.repository("tester/model").files          # path -> bytes, of the latest commit

It keeps everything in memory but large files, and speaks what `huggingface_hub` uses for models, Xet included:
https://huggingface.co/docs/hub/api and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER, TOKEN = "tester", "hf_loopback_token"
LARGE_ENDINGS = (".safetensors", ".bin", ".pt", ".png")
FREE = ("/_lfs/", "/api/validate-yaml")  # without a token: storage has signed addresses
ID, REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"


@dataclass
class Commit:
    """What a repository held after one commit; `oids` are Git's for small files, sha256 for large ones."""

    oid: str
    title: str
    files: dict[str, bytes]
    oids: dict[str, str]


@dataclass
class Repository:
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {}, {})])

    @property
    def files(self):
        return self.commits[-1].files

    def at(self, revision):
        found = [commit for commit in self.commits if commit.oid == revision]
        return found[0] if found else self.commits[-1]


@dataclass
class Fault:
    """What happens to the next `times` requests that match: a status, a connection cut after some bytes, silence."""

    method: str
    path: str
    status: int | None = None
    cut_after: int | None = None
    silent_for: float | None = None
    """Seconds until the connection ends, without an answer."""
    half_answer: bool = False
    """Headers and a part of the body, then the end."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server, running in a thread while its `with` block lasts."""

    def __init__(self, folder):
        self.folder, self.lock = Path(folder), threading.RLock()
        self.repositories, self.faults, self.log, self.bodies = {}, [], [], []
        self.closing = threading.Event()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, xet=False):
        """The variables of a process for which this is the Hub: no cache of another Hub, not offline; Xet if asked."""
        hub = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(self.folder / "home")}
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        return {
            **kept,
            **hub,
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, method, path, **what):
        """Let the next requests whose path contains the pattern fail; see `Fault`."""
        self.faults.append(Fault(method, path, **what))

    def repository(self, name):
        return self.repositories[name]

    def forget_large_files(self):
        """Have none of the large files that were sent so far, so that each is sent once more."""
        for stored in self.folder.iterdir():
            if len(stored.name) == 64:
                stored.unlink()

    def received(self, since=0):
        """All bytes that were sent since a number of requests, those of files inside JSON decoded."""
        for body in self.bodies[since:]:
            yield body
            for inner in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', body):
                yield base64.b64decode(inner)

    def requests(self, method, path):
        """How often a request was made."""
        return sum(done == method and re.search(path, target) is not None for done, target in self.log)


class Refusal(Exception):
    def __init__(self, status, message, code=""):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def answer_request(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        fault = self._next_fault(path)
        if fault and fault.cut_after is not None:
            self.hub.bodies.append(self.rfile.read(fault.cut_after))
            return self._cut()
        # Read whatever the answer will be: what stays in the connection would be taken for the next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.bodies.append(self.path.encode() + b"\n" + self.body)
        if fault and fault.silent_for:
            self.hub.closing.wait(fault.silent_for)
            return self._cut()
        if fault and fault.half_answer:
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"na')
            return self._cut(lingering=True)
        try:
            if fault:
                raise Refusal(fault.status, "injected")
            if not path.startswith(FREE) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials")
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split("|"):
                    with self.hub.lock:
                        return action(self, *match.groups())
            raise Refusal(404, f"No route for {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.reply({"error": refusal.message}, refusal.status, {**headers, **(fault.headers if fault else {})})

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def log_message(self, *arguments):
        pass

    def _next_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _cut(self, lingering=False):
        # Lingering for 0 seconds sends a reset instead of an orderly end.
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, int(lingering)))
        self.close_connection = True
        self.connection.close()

    def reply(self, value=b"", status=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self):
        return json.loads(self.body)

    def find(self, name):
        if name not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[name]

    def create(self):
        asked = self.json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository())
        self.reply({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def who(self):
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {}})

    def validate(self):
        self.reply({"errors": [], "warnings": []})

    def info(self, name, revision="main"):
        commit = self.find(name).at(revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply({"id": name, "modelId": name, "sha": commit.oid, "tags": [], "private": False, "siblings": files})

    def tree(self, name, revision, folder=None):
        commit = self.find(name).at(revision)
        inside = [path for path in sorted(commit.files) if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            raise Refusal(404, "Not found", "EntryNotFound")
        entries = [{"type": "file", "path": p, "oid": commit.oids[p], "size": len(commit.files[p])} for p in inside]
        self.reply(entries)

    def preupload(self, name, revision):
        commit = self.find(name).at(revision)
        files = []
        for asked in self.json()["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LARGE_ENDINGS) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": commit.oids.get(path)})
        self.reply({"files": files})

    def batch(self, name):
        self.find(name)
        objects = []
        for asked in self.json()["objects"]:
            target = f"{self.hub.url}/_lfs/{asked['oid']}"
            actions = {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}
            stored = (self.hub.folder / asked["oid"]).is_file()
            objects.append({**asked, **({} if stored else {"actions": actions})})
        self.reply({"transfer": "basic", "objects": objects})

    def xet(self, name, revision):
        """Where hf_xet stores large files: a folder, which `local://` is to it."""
        self.find(name)
        place, until = f"local://{self.hub.folder / 'xet'}", 2**31
        told = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": str(until)}
        self.reply({"casUrl": place, "accessToken": "none", "exp": until}, 200, told)

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have this sha256")
        (self.hub.folder / oid).write_bytes(self.body)
        self.reply()

    def verify(self, oid):
        self.reply(b"", 200 if (self.hub.folder / oid).is_file() else 404)

    def commit(self, name, revision):
        repository, title = self.find(name), ""
        files, oids = dict(repository.commits[-1].files), dict(repository.commits[-1].oids)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = data
                oids[value["path"]] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            elif line["key"] == "lfsFile":
                stored, oids[value["path"]] = self.hub.folder / value["oid"], value["oid"]
                files[value["path"]] = stored.read_bytes() if stored.is_file() else b"in Xet's folder"
            else:
                raise Refusal(400, f"Unknown operation {line['key']}")
        oid = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits.append(Commit(oid, title, files, oids))
        self.reply({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def resolve(self, name, revision, path):
        commit = self.find(name).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{commit.oids[path]}"', "Content-Length": str(len(data))}
        self.reply(data, 200, headers)


ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET|HEAD", f"/api/models/{ID}", Handler.info),
    ("GET|HEAD", f"/api/models/{ID}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{ID}/tree/{REVISION}/?(.+)?", Handler.tree),
    ("POST", f"/api/models/{ID}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("GET", f"/api/models/{ID}/xet-write-token/{REVISION}", Handler.xet),
    ("PUT", r"/_lfs/(\w{64})", Handler.store),
    ("POST", r"/_lfs/(\w{64})/verify", Handler.verify),
    ("POST", f"/api/models/{ID}/commit/{REVISION}", Handler.commit),
    ("GET|HEAD", f"/{ID}/resolve/{REVISION}/(.+)", Handler.resolve),
]
