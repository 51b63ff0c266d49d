"""A Hub on this machine, as far as uploads and downloads go."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.hf_api


@contextmanager
def serve_hub(monkeypatch, kind, repo_id):
    """
    A Hub with one repository of a kind ("models" or "datasets"), to which the environment's token gives access: yields
    what it was asked to make and to delete and what it was sent, which it gives back, and its address as "url". It
    tells of the files named in "there" besides.
    """
    received = {"created": [], "files": {}, "deleted": [], "tokens": set(), "there": []}
    api = f"/api/{kind}/{repo_id}"
    files = received["files"]

    def revision():
        """A commit's name, another one after each change."""
        return hashlib.sha1(repr([(name, len(files[name])) for name in sorted(files)]).encode()).hexdigest()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            names = sorted({*received["there"], *files})
            place = self.path.partition("?")[0]
            if place.startswith(f"{api}/tree/"):
                sizes = {name: len(files.get(name, b"0")) for name in names}
                self.answer([{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in names])
            elif place.startswith(api):
                self.answer({"id": repo_id, "sha": revision(), "siblings": [{"rfilename": name} for name in names]})
            else:
                self.give_file(place)

        do_HEAD = do_GET

        def give_file(self, place):
            parts = place.removeprefix(f"/{repo_id}/resolve/").partition("/")
            content = files.get(parts[2]) if place.startswith(f"/{repo_id}/resolve/") else None
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", revision())
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received["tokens"].add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                received["created"].append(json.loads(body))
                self.answer({"url": page, "id": repo_id})
            elif self.path == f"{api}/preupload/main":
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]})
            elif self.path == f"{api}/commit/main":
                for item in map(json.loads, body.splitlines()):
                    if item["key"] == "file":
                        received["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                    elif item["key"] == "deletedFile":
                        received["deleted"].append(item["value"]["path"])
                commit = "0" * 40
                self.answer({"commitUrl": f"{page}/commit/{commit}", "commitOid": commit})
            elif self.path == "/api/validate-yaml":
                self.answer({})
            else:
                self.send_error(404)

        def answer(self, value):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(json.dumps(value).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    received["url"] = url
    page = f"{url}/{repo_id}" if kind == "models" else f"{url}/{kind}/{repo_id}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    use_hub(monkeypatch, url)
    yield received
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, url):
    """Has this program take the Hub at that address for the Hub, and gives it a token."""
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace(huggingface_hub.constants.ENDPOINT, url),
    )
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
