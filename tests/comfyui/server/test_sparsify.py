"""Weights to zero from the page: the shipped workflow, the bits of the command line, a job that is
stopped, another model's calibration."""

import json
from pathlib import Path

import pytest
from diffusers import QwenImageTransformer2DModel

from ppcl_engine.algorithms.sparsity.files import sparsity_of
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.jobs.state import current_state, read_events
from ppcl_engine.models.opening import open_model
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import SparsifyConfig
from ppcl_engine.stages.convert.sparsify import sparsify
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from .conftest import ROOT, Made, eventually, listening
from .graphs import QUICK, Graph, quickly, shipped

# the job is the engine's; that the host loads what it writes is tried inside of every host
pytestmark = pytest.mark.any_host
DEMO = ROOT / "ppcl_engine" / "demo"
TEACHER, BUNDLE = DEMO / "teacher.safetensors", DEMO / "demo.ppcl.safetensors"
FAST = {name: value for name, value in QUICK["PPCL_Sparsify"].items() if name != "preview_seconds"}


@pytest.fixture(scope="module")
def drawn(server) -> Made:
    """The shipped workflow, with settings for seconds."""
    prompt = quickly(shipped("ppcl-demo-sparsify"))
    with listening(server, "sparse") as heard:
        entry = server.run(prompt, heard.client)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    return Made(prompt, entry, heard)


@pytest.fixture(scope="module")
def calibrated(drawn, runs) -> str:
    """The name of its calibration's run."""
    return runs("calibrate")[-1].name


def exported(folder: Path) -> Path:
    (file,) = (folder / "exports").glob("*.safetensors")
    return file


def by_the_command_line(calibrated: str, server, folder: Path, **settings) -> bytes:
    calibration = Run(server.base / "output" / "ppcl" / calibrated).calibration
    return sparsify(
        SparsifyConfig(run=folder, calibration=calibration, device="cpu", **{**FAST, **settings})
    ).read_bytes()


def test_the_workflow_prunes_loads_and_draws(server, drawn, runs, calibrated, tmp_path):
    file = exported(runs("sparse")[0])
    sparsity = sparsity_of(TensorFile(file).metadata)
    assert sparsity.dropped == sparsity.weights // 2 > 100_000
    weight = open_model(file).transformer_blocks[5].attn.to_q.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert file.read_bytes() == by_the_command_line(
        calibrated, server, tmp_path, path=TEACHER, name="half"
    )
    assert drawn.outputs("PPCL_Sparsify")["images"] and drawn.outputs("PPCL_Compare")["images"]


def test_it_says_how_far_it_is(drawn):
    (number,) = drawn.numbers("PPCL_Sparsify")
    steps = [value for node, value, most in drawn.heard.progress if node == number and most == 24]
    assert max(steps) > 1 and steps == sorted(steps)
    lines = [line for node, line in drawn.heard.texts if node == number]
    assert any(line.startswith("sparsify ") and " of 24" in line for line in lines)
    assert "weights are zero (unstructured)" in lines[-1] and "/half.safetensors: " in lines[-1]
    assert number in drawn.heard.previews


def test_unchanged_inputs_do_not_run_again(server, drawn, runs):
    """Nothing of ComfyUI's own cache is left."""
    before = {path.name: len(read_events(path)) for path in runs()}
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert server.run(drawn.prompt)["status"]["status_str"] == "success"
    assert {path.name: len(read_events(path)) for path in runs()} == before


def test_a_variant_whose_job_is_stopped_ends_in_the_same_bits(
    server, known, runs, calibrated, tmp_path
):
    """A bundle's variant is made sparse on its run's full model, stopped by the page's own Cancel and
    then run again."""
    name = f"demo/{BUNDLE.name}"
    settings = {**FAST, "exchange": True, "variant": "small", "pattern": "2:4", "name": "small_2_4"}
    graph = Graph(known, 1100)
    number = graph.add("PPCL_Sparsify", run=calibrated, file=name, **settings)
    loaded = graph.add("PPCL_LoadModel", file=[number, 3], base="none")
    graph.text([loaded, 1])
    before = len(runs("sparse"))
    prompt = server.queue(graph.nodes)
    folder = eventually(lambda: runs("sparse")[before:], "there was no job")[0]
    eventually(
        lambda: (state := current_state(folder)).is_final or state.step > 3, "it did not begin"
    )
    server.post("/interrupt", {})
    kinds = [kind for kind, _ in server.ended(prompt)["status"]["messages"]]
    assert "execution_interrupted" in kinds and current_state(folder).status == "cancelled"
    done = {path.name for path in (folder / "sparsified" / "small_2_4").iterdir()}
    assert len(done) > 3
    entry = server.run(graph.nodes)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    again = runs("sparse")[-1]
    assert again.name == f"{folder.name}-2" and read_events(again)[0]["kind"] == "continued"
    del settings["name"]
    expected = by_the_command_line(
        calibrated, server, tmp_path, path=BUNDLE, base=TEACHER, **settings, name="small_2_4"
    )
    assert exported(again).read_bytes() == expected


def test_a_calibration_of_another_model_is_one_line(server, known, calibrated):
    config = QwenImage().tiny_config
    model = QwenImageTransformer2DModel(**config)
    path = server.base / "models" / "diffusion_models" / "another.safetensors"
    write_tensors(path, model.state_dict(), {"config": json.dumps(config)})
    graph = Graph(known, 1200)
    graph.add("PPCL_Sparsify", run=calibrated, file=path.name)
    message = server.error_of(graph.nodes).strip()
    assert message == f"{calibrated} was calibrated on another model; run calibrate on this one"
