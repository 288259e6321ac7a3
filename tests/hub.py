"""A Hub on this machine, of which the repositories are folders: enough of its interface to fetch and push by id."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_this_test"


def talk_to(address: str, monkeypatch) -> None:
    """Let this process take the Hub at an address for the real one."""
    from huggingface_hub import constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(constants, name, value)


def run_elsewhere(code: str, folder: Path, address: str) -> None:
    """Run code in a new process and in a folder, with an empty cache and the Hub at this address."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@contextmanager
def hub(folder: Path, owners=("me",), cards=None, refused: tuple[int, str] | None = None):
    """The address of a Hub whose repository owner/name is `folder`/owner/name.

    owners: whose repositories the bearer of TOKEN may write. cards: {id: card data} of models without files. refused: a
    status and the Hub's own word for it, such as (403, "GatedRepo"), with which it answers every reading.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body: bool):
            path = unquote(urlparse(self.path).path).strip("/")
            if refused:
                self.send(refused[0], b"", {"X-Error-Code": refused[1]})
                return
            if path.startswith("api/models/") and "/tree/" in path:
                owner, name = path.split("/")[2:4]
                self.send(200, json.dumps(self.tree(folder / owner / name)).encode(), body=body)
                return
            if path.startswith("api/models/"):
                owner, name = path.split("/")[2:4]
                content, headers = self.about(owner, name), {}
            else:
                owner, name, _, _, *file = path.split("/")  # owner/name/resolve/revision/file
                place = folder / owner / name / "/".join(file)
                content = place.read_bytes() if place.is_file() else None
                etag = hashlib.sha256(content or b"").hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
            if content is None:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self.send(200, content, headers, body)

        def do_POST(self):
            path = unquote(urlparse(self.path).path).strip("/")
            if self.headers.get("Transfer-Encoding") == "chunked":
                sent = self.chunks()
            else:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path == "api/validate-yaml":
                self.send_json({"errors": [], "warnings": []})
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send(401, b'{"error": "Invalid credentials in Authorization header"}')
                return
            if path == "api/repos/create":
                asked = json.loads(sent)
                owner, name = asked["organization"], asked["name"]
            else:
                owner, name = path.split("/")[2:4]
            if owner not in owners:
                self.send(403, b'{"error": "You don\'t have the rights to write there"}')
            elif path == "api/repos/create":
                self.create(folder / owner / name)
            elif "/preupload/" in path:
                files = [file["path"] for file in json.loads(sent)["files"]]
                self.send_json(
                    {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
                )
            else:
                self.commit(folder / owner / name, sent)

        def create(self, root: Path):
            exists = root.is_dir()
            root.mkdir(parents=True, exist_ok=True)
            address = f"http://127.0.0.1:{server.server_port}/{root.parent.name}/{root.name}"
            self.send(409 if exists else 200, json.dumps({"url": address}).encode())

        def commit(self, root: Path, sent: bytes):
            for line in sent.decode().splitlines():
                entry = json.loads(line)
                place = root / entry["value"].get("path", "")
                if entry["key"] == "file":
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(entry["value"]["content"]))
                elif entry["key"] == "deletedFile":
                    place.unlink()
            address = f"http://127.0.0.1:{server.server_port}/{root.parent.name}/{root.name}/commit/{COMMIT}"
            self.send_json({"commitOid": COMMIT, "commitUrl": address, "success": True})

        def chunks(self) -> bytes:
            sent = b""
            while size := int(self.rfile.readline(), 16):
                sent += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return sent

        def about(self, owner: str, name: str):
            root = folder / owner / name
            known = (cards or {}).get(f"{owner}/{name}")
            if not root.is_dir() and known is None:
                return None
            about = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT, "private": False}
            about |= {"siblings": [{"rfilename": file} for file in files_of(root)], "tags": [], "downloads": 0}
            return json.dumps({**about, "cardData": known}).encode()

        def tree(self, root: Path) -> list[dict]:
            return [
                {"type": "file", "path": file, "size": (root / file).stat().st_size, "oid": COMMIT}
                for file in files_of(root)
            ]

        def send_json(self, content: dict):
            self.send(200, json.dumps(content).encode())

        def send(self, status: int, content: bytes, headers=None, body: bool = True):
            self.send_response(status)
            given = {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(content))}
            for key, value in given.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def files_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
