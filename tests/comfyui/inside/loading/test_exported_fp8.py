"""A model that was exported in scaled fp8, on the host's own layers."""

import comfyui_version
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS

from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export

from ..conftest import fp8_in
from ..forwards import relative_error


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teacher, run_folder, models):
    """The interval without a correction, in fp8 and in full precision."""
    run = Run(run_folder)
    plan = run.load_plan()
    chosen = Variant(name="plain", intervals=("3-4",))
    assert plan.interval("3-4").correction == "none"
    folder = tmp_path_factory.mktemp("fp8")
    for file in run.folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "plan.json").unlink()
    (folder / "plan.json").write_text(plan.with_parts(variants=(chosen,)).to_json())
    tensors = {}
    for store in ("float8", "float32"):
        config = {
            "layout": "comfyui",
            "variant": "plain",
            "name": f"exported_{store}",
            "store": store,
        }
        path = export(ExportConfig(model=teacher, run=folder, **config))
        tensors[store] = path.replace(models.diffusion_models / path.name)
    return tensors


def test_the_host_runs_it_on_its_own_fp8_layers(stored, load, velocity, caplog):
    exact = velocity(load(stored["float32"].name, variant="", switchable=False))
    caplog.clear()
    model = load(stored["float8"].name, variant="", switchable=False, weight_dtype="default")
    assert 0 < relative_error(velocity(model), exact) < 0.1
    assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
    layer = model.model.diffusion_model.transformer_blocks[0].attn.to_q
    stored_weight, scale = fp8_in(layer)
    assert stored_weight.dtype == torch.float8_e4m3fn and scale != 1


def test_the_oldest_host_knows_no_int8():
    """README and help say so."""
    stored_as = {algorithm["storage_t"] for algorithm in QUANT_ALGOS.values()}
    assert torch.float8_e4m3fn in stored_as
    assert (torch.int8 in stored_as) == (comfyui_version.__version__ != "0.3.75")
