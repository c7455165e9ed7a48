"""A stand-in for the Hugging Face Hub on loopback, enough to push models and load them back; standard library only.

with HubStandin() as hub:
    hub.run("model.push_to_hub('me/tiny') ...")   # Python code, in a subprocess that talks to this hub
    hub.files("me/tiny")                           # {path: bytes} as pushed
    hub.clear()                                    # as new
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WARM = Path(__file__).parent / "launched" / "warm.py"
LFS_FROM = 10_000  # bytes; smaller files travel inside the commit


class HubStandin:
    """The server with its memory: `repositories` = {name: {path: bytes}}."""

    def __init__(self):
        self.repositories, self.blobs, self.home, self.warm = {}, {}, tempfile.TemporaryDirectory(), None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        if self.warm:
            self.warm.communicate()
        self.server.shutdown()
        self.server.server_close()
        self.home.cleanup()

    def clear(self):
        self.repositories.clear(), self.blobs.clear()
        for folder in Path(self.home.name).iterdir():
            shutil.rmtree(folder)

    def files(self, repository):
        return self.repositories[repository]

    @property
    def env(self):
        """The environment of a process that uses this hub; huggingface_hub reads it on import."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_standin",
            "HF_HOME": self.home.name,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, code, *arguments, cwd=None):
        """Run Python `code` (or, when it ends in .py, that script) against this hub; returns its standard output.

        It runs in a fork of a process that imported the libraries with `env` (tests/launched/warm.py).
        """
        self.warm = self.warm or subprocess.Popen(
            [sys.executable, str(WARM)], env=self.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("stdout", "stderr"))
            request = [code, [str(word) for word in arguments], str(cwd or os.getcwd()), str(out), str(err)]
            print(json.dumps(request), file=self.warm.stdin, flush=True)
            status = int(self.warm.stdout.readline())
            out, err = out.read_text(), err.read_text()
        if status:
            raise AssertionError(f"exit status {status}\n{out[-2000:]}\n{err[-6000:]}")
        return out


class _Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+.*)?", path):
            name, view = match.groups()
            return self._describe(name, view)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve(*match.groups())
        return self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name'].split('/')[-1]}"
            self.hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            verdict = _validate(json.loads(body)["content"])
            return self._json(verdict, status=400 if verdict["errors"] else 200)
        if path.endswith("/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|paths-info)/.+", path):
            name, action = match.groups()
            if name not in self.hub.repositories:
                return self._missing("RepoNotFound")
            return {"preupload": self._preupload, "commit": self._commit, "paths-info": self._paths}[action](
                name, body
            )
        return self._missing("EntryNotFound")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[self.path.rsplit("/", 1)[-1]] = body
        self._json({})

    def _describe(self, name, view):
        if name not in self.hub.repositories:
            return self._missing("RepoNotFound")
        files = self.hub.repositories[name]
        if view == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "modelId": name, "sha": _sha(files), "siblings": siblings, "tags": []})

    def _resolve(self, name, path):
        files = self.hub.repositories.get(name)
        if files is None or path not in files:
            return self._missing("RepoNotFound" if files is None else "EntryNotFound")
        headers = {"X-Repo-Commit": _sha(files), "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        return self._send(200, files[path], headers | {"Content-Type": "application/octet-stream"})

    def _preupload(self, name, body):
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def _upload(self, wanted):
        upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, name, body):
        files = self.hub.repositories[name]
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        oid = _sha(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    def _paths(self, name, body):
        files, wanted = self.hub.repositories[name], json.loads(body)["paths"]
        self._json([_entry(path, files[path]) for path in wanted if path in files])

    def _missing(self, code):
        self._send(404, b'{"error": "not found"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _validate(card):
    """What the real Hub most often objects to: no metadata, or a base model or data set that is no Hub name."""
    import yaml

    parts = card.split("---\n", 2)
    if len(parts) < 3 or parts[0]:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    data = yaml.safe_load(parts[1])
    names = [data.get("base_model"), *(data.get("datasets") or [])]
    wrong = [name for name in names if name and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name))]
    return {"errors": [{"message": f"{name!r} is not a valid repo id"} for name in wrong], "warnings": []}


def _sha(files):
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()


def _entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
