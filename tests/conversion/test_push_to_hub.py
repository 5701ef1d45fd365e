"""`--push-to-hub` against a local server that speaks as much of the Hub's protocol as an upload needs."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from uni_moe_sets import BY_NAME, arguments, is_there

VARIANT = BY_NAME["unimoe_speech-cases_e2"]
pytestmark = pytest.mark.skipif(not is_there(VARIANT), reason="the golden set is not there")


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories of one user, kept in memory."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        server = self.server
        if self.headers.get("Authorization") != "Bearer hf_local":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            name = f"me/{json.loads(body)['name']}"
            server.private = json.loads(body).get("private") or json.loads(body).get("visibility") == "private"
            return self._answer(200, {"url": f"{server.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path and server.takes_commits:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._answer(
                200, {"commitUrl": f"{server.address}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        return self._answer(404, {"error": f"no {self.path} here"})

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_local":
            return self._answer(401, {"error": "Invalid username or password."})
        self._answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.files, server.private, server.takes_commits = {}, None, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def convert(tmp_path, endpoint, token):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "unimoe", "convert", "uni-moe", *arguments(VARIANT)]
    command += ["--output", str(tmp_path / "model"), "--push-to-hub", "me/model"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_whole_folder_arrives(hub, tmp_path):
    run = convert(tmp_path, hub.address, "hf_local")
    assert run.returncode == 0, run.stderr
    assert f"uploaded to {hub.address}/me/model" in run.stdout
    written = {
        str(path.relative_to(tmp_path / "model")): path.read_bytes()
        for path in (tmp_path / "model").rglob("*")
        if path.is_file()
    }
    assert hub.files == written and hub.private
    assert b'model="me/model"' in hub.files["README.md"]


@pytest.mark.parametrize("token, reachable", [("wrong", True), ("hf_local", False)])
def test_a_hub_that_refuses_is_known_before_the_work(hub, tmp_path, token, reachable):
    run = convert(tmp_path, hub.address if reachable else "http://127.0.0.1:9", token)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "--push-to-hub me/model: the Hub refuses or cannot be reached" in run.stderr
    assert not (tmp_path / "model").exists() and not hub.files


def test_a_failed_upload_keeps_the_folder(hub, tmp_path):
    hub.takes_commits = False
    run = convert(tmp_path, hub.address, "hf_local")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"{tmp_path / 'model'} is finished, but uploading it to me/model failed" in run.stderr
    assert (tmp_path / "model" / "config.json").is_file() and not hub.files
