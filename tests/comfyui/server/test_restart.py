"""A server that dies with a job at work: with keep_running the job goes on and is found again,
without it it ends too."""

import shutil

import pytest

from ppcl_engine.jobs.spec import read_spec
from ppcl_engine.jobs.state import current_state, is_alive, read_events, read_state

from .conftest import begin, eventually, new_base
from .graphs import Graph

ROUNDS = 2000  # far more than are done before a slow machine has started its server again
SETTINGS = {"updates": 25, "learning_rate": 1e-3, "preview_seconds": 0}


@pytest.fixture
def base(server, made, tmp_path):
    """A folder for servers of its own, with the plan that another one made: ComfyUI was copied,
    say."""
    base = new_base(tmp_path / "base")
    runs = server.base / "output" / "ppcl"
    for kind in ("detect", "probe", "record"):
        folder = next(runs.glob(f"{kind}-*"))
        shutil.copytree(folder, base / "output" / "ppcl" / folder.name)
    return base


def training(base, known: dict, **widgets) -> dict:
    graph = Graph(known, 1)
    plan = next((base / "output" / "ppcl").glob("detect-*")).name
    graph.add("PPCL_DistillDepth", run=plan, **{**SETTINGS, **widgets})
    return graph.nodes


def at_work(base, rounds: int):
    """The folder of the training of so many rounds, in the middle of its work."""

    def look():
        for folder in (base / "output" / "ppcl").glob("depth-*"):
            if (
                read_spec(folder).stages[0][1]["rounds"] == rounds
                and current_state(folder).step > 20
            ):
                return folder

    return eventually(look, "the job did not begin")


@pytest.mark.any_host
def test_a_dead_server(base):
    server, process = begin(base)
    known = server.get("/object_info")
    try:
        server.queue(training(base, known, rounds=ROUNDS, keep_running=True))
        kept = at_work(base, ROUNDS)
    finally:
        process.kill()
        process.wait()
    before = read_state(kept)
    server, process = begin(base)
    try:
        assert current_state(kept).status == "running" and current_state(kept).pid == before.pid
        watch = Graph(known, 1)
        text = watch.text([watch.add("PPCL_WatchJob", run_name="newest", wait=False), 2])
        assert "distill-depth " in server.run(watch.nodes)["outputs"][text]["text"][0]
        prompt = server.queue(training(base, known, rounds=ROUNDS, keep_running=True))
        step = current_state(kept).step
        eventually(lambda: current_state(kept).step > step + 20, "it does not go on")
        server.post("/interrupt", {})
        server.ended(prompt)
        assert current_state(kept).status == "cancelled"
        assert [event["kind"] for event in read_events(kept)].count("started") == 1
        server.queue(training(base, known, rounds=ROUNDS + 1))
        left = at_work(base, ROUNDS + 1)
    finally:
        process.kill()
        process.wait()
    pid, started = read_state(left).pid, read_state(left).process_started
    eventually(lambda: not is_alive(pid, started), "the job outlives the server", 60)
    state = current_state(left)
    assert state.status == "cancelled" and "the process that started it has ended" in state.error
