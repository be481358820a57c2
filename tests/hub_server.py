"""A stand-in for the Hugging Face Hub on loopback: repositories in memory, the requests of huggingface_hub.

Knows whoami, creating repositories, uploads (small files in the commit, large ones by LFS), model info, the
tree, and downloads. One token, TOKEN, may write and may see private repositories; READ_TOKEN may only read.

It fails where it is told to: POST /faults takes a list of [what a request begins with, a status or "drop"],
each of which is met once.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stand_in_secret"
READ_TOKEN = "hf_stand_in_reader"
ROLES = {TOKEN: "write", READ_TOKEN: "read"}
USER = "me"


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []

    @property
    def commit(self) -> str:
        return hashlib.sha1("\n".join(self.messages).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `repositories`, by id, can be looked at and filled by a test."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self.faults: list[list] = []
        self.unknown: list[str] = []  # requests that this stand-in does not know

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        path = unquote(urlsplit(self.path).path).strip("/")
        self.query = parse_qs(urlsplit(self.path).query)
        self.server.requests.append(f"{method} {path}")
        if path == "faults":
            self.server.faults = json.loads(self.body)
            return self.send(200)
        for fault in self.server.faults:
            if f"{method} {path}".startswith(fault[0]):
                self.server.faults.remove(fault)
                return self.fail(fault[1])
        parts = path.split("/")
        if path == "api/whoami-v2":
            return self.whoami()
        if path == "api/repos/create":
            return self.create()
        if path == "api/validate-yaml":  # of a README.md
            return self.send_json({"errors": [], "warnings": []})
        if parts[0] == "lfs":
            return self.store(parts[1])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch()
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self.model("/".join(parts[2:4]), parts[4:])
        if "resolve" in parts[2:3]:
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.server.unknown.append(f"{method} {path}")
        return self.refuse(404, "RepoNotFound", "not known to the stand-in")

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # --- answers ----------------------------------------------------------------------------------

    def send(self, status, content=b"", content_type="application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        length = headers.pop("Content_Length", len(content))
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status=200, **headers):
        self.send(status, json.dumps(value).encode(), **headers)

    def fail(self, how):
        if how == "drop":  # in the middle of a request, without an answer
            self.close_connection = True
            return self.connection.close()
        return self.refuse(how, "Fault", "told to fail")

    def refuse(self, status, code, text):
        content = json.dumps({"error": text}).encode()
        self.send(status, content, X_Error_Code=code, X_Error_Message=text)

    def log_message(self, *arguments):
        pass

    # --- the api ----------------------------------------------------------------------------------

    @property
    def role(self):
        return ROLES.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    @property
    def authorized(self):
        return self.role == "write"

    def whoami(self):
        if self.role is None:
            return self.refuse(401, "InvalidToken", "Invalid user token.")
        access = {"type": "access_token", "accessToken": {"displayName": "x", "role": self.role}}
        orgs = [{"name": "my-org"}]
        about = {"type": "user", "name": USER, "fullname": "Me", "orgs": orgs, "auth": access}
        return self.send_json(about)

    def create(self):
        if not self.authorized:
            return self.refuse(401, "InvalidToken", "Invalid user token.")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        known = self.server.repositories.get(repo_id)
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if known:
            return self.send_json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[repo_id] = Repository(private)
        return self.send_json(answer)

    def visible(self, repo_id):
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.authorized):
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def model(self, repo_id, rest):
        repository = self.visible(repo_id)
        if repository is None:
            return None
        if rest[:1] == ["preupload"]:
            return self.preupload()
        if rest[:1] == ["commit"]:
            return self.commit(repository, repo_id, rest[1])
        if rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                for path, data in repository.files.items()
            ]
            return self.send_json(files)
        if rest and rest[:2] != ["revision", "main"] and rest[-1] != repository.commit:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in repository.files]
        return self.send_json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": repository.commit,
                "private": repository.private,
                "tags": [],
                "siblings": siblings,
                "downloads": 0,
                "likes": 0,
            }
        )

    def preupload(self):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.send_json({"files": files})

    def batch(self):
        objects = [
            {
                "oid": file["oid"],
                "size": file["size"],
                "actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}},
            }
            for file in json.loads(self.body)["objects"]
        ]
        return self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        return self.send(200)

    def commit(self, repository, repo_id, revision):
        if not self.authorized:
            return self.refuse(403, "Forbidden", "You have no right to write here.")
        if revision != "main":
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large_files[value["oid"]]
        url = f"{self.server.url}/{repo_id}/commit/{repository.commit}"
        return self.send_json({"success": True, "commitUrl": url, "commitOid": repository.commit})

    def resolve(self, repo_id, revision, path):
        repository = self.visible(repo_id)
        if repository is None:
            return None
        if revision not in ("main", repository.commit):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        data = repository.files.get(path)
        if data is None:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.commit)
        headers = {"ETag": f'"{etag(data)}"', "X_Repo_Commit": repository.commit}
        return self.send(200, data, "application/octet-stream", Accept_Ranges="bytes", **headers)


def etag(data):
    return hashlib.sha256(data).hexdigest()
