"""A real ComfyUI server with this pack, on a free port, with folders of its own; stopped when the tests end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "tests" / "comfyui" / "launch.py"
START_SECONDS, RUN_SECONDS = 120, 240


@dataclass
class Server:
    url: str
    base: Path

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def bytes_of(self, image: dict) -> bytes:
        query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
        with urllib.request.urlopen(f"{self.url}/view?{query}") as answer:
            return answer.read()

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, prompt: dict) -> dict:
        """A workflow in API form -> its entry in the server's history, when it has ended."""
        queued = self.post("/prompt", {"prompt": prompt})
        assert queued.get("node_errors") == {}, queued
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            if found := self.get(f"/history/{queued['prompt_id']}"):
                return found[queued["prompt_id"]]
            time.sleep(0.2)
        raise AssertionError("the server did not finish in time")

    def error_of(self, prompt: dict) -> str:
        """What the error box of the page shows."""
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "error"
        return next(data for kind, data in entry["status"]["messages"] if kind == "execution_error")[
            "exception_message"
        ]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "models/ppcl", "models/loras"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "ComfyUI-PPCL").symlink_to(ROOT, target_is_directory=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, LAUNCH, "main.py", "--cpu", "--port", str(port), "--base-directory", base]
    with open(base / "log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield started(Server(f"http://127.0.0.1:{port}", base), process)
    finally:
        stop(process)


def started(server: Server, process: subprocess.Popen) -> Server:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/system_stats")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
        else:
            return server
    raise AssertionError(f"the server did not start:\n{(server.base / 'log.txt').read_text()[-3000:]}")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def demo() -> dict:
    """The shipped demo workflow in API form."""
    return json.loads((ROOT / "workflows" / "api" / "ppcl-demo-three-sizes.json").read_text(encoding="utf-8"))
