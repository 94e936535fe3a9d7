"""A real ComfyUI server with this pack, on a free port, with folders of its own; stopped when the
tests end."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from .graphs import quickly, shipped

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "tests" / "comfyui" / "launch.py"
NOT_IN_LIST = "Value not in list: "  # newer hosts check choices themselves, before a node sees them
START_SECONDS, RUN_SECONDS = 600, 600


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

    def queue(self, prompt: dict, client: str = "") -> str:
        """The prompt's id. `client`: who hears of its progress."""
        queued = self.post("/prompt", {"prompt": prompt, "client_id": client})
        assert queued.get("node_errors") == {}, queued
        return queued["prompt_id"]

    def ended(self, prompt_id: str) -> dict:
        """The prompt's entry in the server's history, when it has ended."""
        return eventually(
            lambda: self.get(f"/history/{prompt_id}").get(prompt_id),
            "the server did not finish in time",
        )

    def run(self, prompt: dict, client: str = "") -> dict:
        return self.ended(self.queue(prompt, client))

    def error_of(self, prompt: dict) -> str:
        """What the error box of the page shows: of the server, which refuses to begin, or of the
        node that failed."""
        queued = self.post("/prompt", {"prompt": prompt})
        if refused := [
            error for node in queued.get("node_errors", {}).values() for error in node["errors"]
        ]:
            return "\n".join(f"{error['message']}: {error['details']}" for error in refused)
        entry = self.ended(queued["prompt_id"])
        assert entry["status"]["status_str"] == "error"
        return next(
            data for kind, data in entry["status"]["messages"] if kind == "execution_error"
        )["exception_message"]


def eventually(look: Callable[[], object], otherwise: str, seconds: float = RUN_SECONDS):
    """What `look` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := look():
            return result
        time.sleep(0.1)
    raise AssertionError(otherwise)


@dataclass
class Heard:
    """What a page would hear on the websocket."""

    client: str
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    """(node, value, maximum)"""
    texts: list[tuple[str, str]] = field(default_factory=list)
    """(node, line)"""
    previews: list[str] = field(default_factory=list)
    """nodes that sent one"""

    def json(self, message: dict) -> None:
        if message["type"] == "progress_state":
            rows = message["data"]["nodes"].values()
            self.progress += [
                (row["node_id"], row["value"], row["max"])
                for row in rows
                if row["state"] == "running"
            ]

    def binary(self, data: bytes) -> None:
        kind, length = struct.unpack(">II", data[:8])
        if kind == 3:
            self.texts.append((data[8 : 8 + length].decode(), data[8 + length :].decode()))
        elif kind == 4:
            self.previews.append(json.loads(data[8 : 8 + length])["node_id"])


@contextmanager
def listening(server: Server, client: str = "tests") -> Iterator[Heard]:
    heard, ready, done = Heard(client), threading.Event(), threading.Event()

    async def listen() -> None:
        url = f"{server.url}/ws?clientId={client}"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, max_msg_size=0) as socket,
        ):
            await socket.send_json(
                {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            )
            ready.set()
            while not done.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    continue
                if message.type is aiohttp.WSMsgType.TEXT:
                    heard.json(message.json())
                elif message.type is aiohttp.WSMsgType.BINARY:
                    heard.binary(message.data)
                else:
                    return

    thread = threading.Thread(target=lambda: asyncio.run(listen()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield heard
    finally:
        done.set()
        thread.join(5)


def new_base(base: Path) -> Path:
    """A folder for a server: the pack, and models of its own."""
    for folder in ("custom_nodes", "models/ppcl", "models/loras", "models/diffusion_models"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "ComfyUI-PPCL").symlink_to(ROOT, target_is_directory=True)
    return base


def begin(base: Path) -> tuple[Server, subprocess.Popen]:
    """A server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        LAUNCH,
        "main.py",
        "--cpu",
        "--port",
        str(port),
        "--base-directory",
        base,
    ]
    with open(base / "log.txt", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return started(Server(f"http://127.0.0.1:{port}", base), process), process


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server, process = begin(new_base(tmp_path_factory.mktemp("comfyui")))
    try:
        yield server
    finally:
        stop(process)


@pytest.fixture(scope="module")
def known(server) -> dict:
    """Every node's inputs, with the files that are there now."""
    return server.get("/object_info")


@pytest.fixture(scope="module")
def runs(server):
    """The folders of a kind of run, oldest first."""
    root = server.base / "output" / "ppcl"
    return lambda kind="": sorted(root.glob(f"{kind}*"), key=lambda path: path.stat().st_mtime_ns)


def started(server: Server, process: subprocess.Popen) -> Server:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/system_stats")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
        else:
            return server
    stop(process)
    raise AssertionError(
        f"the server did not start:\n{(server.base / 'log.txt').read_text()[-3000:]}"
    )


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
    return shipped("ppcl-demo-three-sizes")


@dataclass(frozen=True)
class Made:
    """A workflow that was run."""

    prompt: dict
    """what the server was asked"""
    entry: dict
    """what it answered"""
    heard: Heard
    """what a page would have heard meanwhile"""

    def numbers(self, kind: str) -> list[str]:
        return [number for number, node in self.prompt.items() if node["class_type"] == kind]

    def outputs(self, kind: str) -> dict:
        return self.entry["outputs"][self.numbers(kind)[0]]


@pytest.fixture(scope="session")
def made(server) -> Made:
    """The shipped workflow that makes a pruned model, with settings for seconds instead of
    minutes."""
    prompt = quickly(shipped("ppcl-demo-make-your-own"))
    with listening(server, "maker") as heard:
        return Made(prompt, server.run(prompt, heard.client), heard)
