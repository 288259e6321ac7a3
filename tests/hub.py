"""A Hub on this machine, of which the repositories are folders: enough of its interface to fetch models by id."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, refused: tuple[int, str] | None = None):
    """The address of a Hub whose repository owner/name is `folder`/owner/name.

    `refused` is a status and the Hub's own word for it, such as (403, "GatedRepo"), with which it answers everything.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body: bool):
            path = unquote(urlparse(self.path).path).strip("/")
            if refused:
                self.deny(*refused)
                return
            if path.startswith("api/models/"):
                owner, name = path.split("/")[2:4]
                content, headers = self.about(owner, name), {"Content-Type": "application/json"}
            else:
                owner, name, _, _, *file = path.split("/")  # owner/name/resolve/revision/file
                place = folder / owner / name / "/".join(file)
                content = place.read_bytes() if place.is_file() else None
                etag = hashlib.sha256(content or b"").hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
            if content is None:
                self.deny(404, "EntryNotFound")
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def deny(self, status: int, code: str):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def about(self, owner: str, name: str):
            root = folder / owner / name
            if not root.is_dir():
                return None
            files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
            about = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT, "private": False}
            about |= {"siblings": [{"rfilename": file} for file in files], "tags": [], "downloads": 0}
            return json.dumps(about).encode()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
