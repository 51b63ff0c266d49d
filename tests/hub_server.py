"""A Hub on this machine, as far as an upload goes."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants


@contextmanager
def serve_hub(monkeypatch, kind, repo_id):
    """
    A Hub with one repository of a kind ("models" or "datasets"), to which the environment's token gives access: yields
    what it was asked to make and to delete and what it was sent, and holds the files named in "there".
    """
    received = {"created": [], "files": {}, "deleted": [], "tokens": set(), "there": []}
    api = f"/api/{kind}/{repo_id}"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith(f"{api}/tree/main"):
                files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in received["there"]]
                self.answer(files)
            elif self.path.startswith(api):
                self.answer({"id": repo_id, "siblings": [{"rfilename": name} for name in received["there"]]})
            else:
                self.send_error(404)

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
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    page = f"{url}/{repo_id}" if kind == "models" else f"{url}/{kind}/{repo_id}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    yield received
    server.shutdown()
    server.server_close()
