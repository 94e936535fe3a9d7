"""Jobs from ComfyUI: a chain of them, by POST /prompt, on a tiny teacher whose latents are the demo's."""

import pytest

from ppcl_engine.data import load_calibration
from ppcl_engine.files import TensorFile
from ppcl_engine.jobs.state import read_events

from .conftest import listening
from .graphs import TINY, Graph


@pytest.fixture(scope="module")
def tiny(make_model, save_model):
    """Puts the tiny teacher into a server's folder."""
    model = make_model(in_channels=64, out_channels=16, joint_attention_dim=64)
    return lambda server: save_model(server.base / "models" / "diffusion_models" / TINY, model)


@pytest.fixture(scope="module")
def graph(server, tiny):
    """`graph(100)`: an empty one with node numbers of its own."""
    tiny(server)
    known = server.get("/object_info")
    return lambda first=1: Graph(known, first)


@pytest.fixture(scope="module")
def runs(server):
    """The folders of a kind of run, oldest first."""
    root = server.base / "output" / "ppcl"
    return lambda kind="": sorted(root.glob(f"{kind}*"), key=lambda path: path.stat().st_mtime)


def success(entry: dict) -> dict:
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry["outputs"]


def test_a_chain_of_jobs(server, graph, runs):
    """From a sampler to a file that is loaded again; every step says how far it is, training shows pictures."""
    g = graph()
    run = g.detected()
    edit = g.add("PPCL_EditPlan", run=run, intervals="1-2 3-4")
    depth = g.distilled([edit, 0])
    width = g.add("PPCL_DistillWidth", run=[depth, 0], choose="by name", sites="ffn_text:0", rounds=1, updates=2,
                  polish_steps=2, preview_seconds=1)  # fmt: skip
    tuned = g.add("PPCL_FineTune", run=[width, 0], steps=2, save_every=1)
    export = g.add("PPCL_Export", run=[tuned, 0], name="mine", store="float32")
    loaded = g.add("PPCL_LoadModel", file=[export, 3], base=TINY, variant="smallest")
    info = g.add("PPCL_Info", model=[loaded, 0])
    texts = [
        g.shown([number, place]) for number, place in ((edit, 2), (depth, 2), (tuned, 2), (export, 2), (export, 3))
    ]
    with listening(server) as heard:
        outputs = success(server.run(g.nodes, heard.client))
    said = [outputs[number]["text"][0] for number in texts]
    assert said[0].startswith("2 intervals, 2 of 6 blocks removed\n1-2: damage 0.")
    assert "1-2: loss" in said[1] and "8 updates" in said[1]
    assert "small_tuned: 0." in said[2] and "velocity error" in said[2]
    assert said[4] == f"runs/{runs('export')[0].name}/mine.ppcl.safetensors" and said[3].startswith(said[4])
    assert all(outputs[number]["images"] for number in (edit, depth, width, tuned, export, info))
    for number in (depth, width, tuned):
        assert max(value for node, value, _ in heard.progress if node == number) > 1
        assert number in heard.previews
        assert any(node == number and "loss" in line for node, line in heard.texts)
    assert any("16 of 16 samples are recorded" in line for _, line in heard.texts)


def test_unchanged_inputs_do_not_run_again(server, graph, runs):
    """Nothing of ComfyUI's own cache is left: the nodes have other numbers, the clean-up is asked for."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    before = {path.name: len(read_events(path)) for path in runs()}
    g = graph(100)
    run = g.detected()
    edit = g.add("PPCL_EditPlan", run=run, intervals="1-2 3-4")
    g.distilled([edit, 0])
    success(server.run(g.nodes))
    assert {path.name: len(read_events(path)) for path in runs()} == before


def test_changed_inputs_take_over_what_is_valid(server, graph, runs):
    """Another number of blocks: curves stay. Other intervals by hand: the student that is the same stays."""
    g = graph(200)
    run = g.detected(remove=3)
    edit = g.add("PPCL_EditPlan", run=g.detected(), intervals="1-2")
    depth = g.distilled([edit, 0])
    success(server.run({**g.nodes, "299": {"class_type": "PreviewAny", "inputs": {"source": run}}}))
    old, new = (TensorFile(path / "curves.safetensors").path.stat() for path in runs("detect"))
    assert (old.st_ino, old.st_size) == (new.st_ino, new.st_size)
    first, second = runs("depth")
    assert [path.name for path in (second / "depth").iterdir()] == ["1-2.safetensors"]
    assert (first / "depth" / "1-2.safetensors").read_bytes() == (second / "depth" / "1-2.safetensors").read_bytes()
    assert depth in g.nodes


def test_more_samplings_fill_a_recording(server, graph, runs):
    g = graph(300)
    run, latent = g.recording(seed=1, samples=24)
    again, _ = g.recording(seed=2, samples=24)
    g.nodes.pop(again[0])
    sampler = next(n for n, node in reversed(g.nodes.items()) if node["class_type"] == "KSampler")
    g.nodes[sampler]["inputs"]["model"] = [run[0], 0]
    for link in (latent, [sampler, 0]):
        g.add("PreviewAny", source=link)
    success(server.run(g.nodes))
    assert load_calibration(runs("record")[-1] / "calibration.safetensors").samples == 24
