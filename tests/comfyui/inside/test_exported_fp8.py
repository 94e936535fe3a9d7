"""A model that was exported in scaled fp8, on the host's own layers."""

import pytest
import torch

from ppcl_engine.config_files import ExportConfig
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.stages.export import export

from .conftest import relative_error


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
    found = {}
    for store in ("float8", "float32"):
        config = {"layout": "comfyui", "variant": "plain", "name": f"exported_{store}", "store": store}
        path = export(ExportConfig(model=teacher, run=folder, **config))
        found[store] = path.replace(models.diffusion_models / path.name)
    return found


def test_the_host_runs_it_on_its_own_fp8_layers(stored, load, velocity, caplog):
    exact = velocity(load(stored["float32"].name, variant="", switchable=False))
    caplog.clear()
    model = load(stored["float8"].name, variant="", switchable=False, weight_dtype="default")
    assert 0 < relative_error(velocity(model), exact) < 0.1
    assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]
    layer = model.model.diffusion_model.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == torch.float8_e4m3fn and float(layer.scale_weight) != 1


def test_the_host_knows_no_int8():
    """README and help say so; the day it does, there is a format to write."""
    from comfy.quant_ops import QUANT_ALGOS

    assert QUANT_ALGOS and {algorithm["storage_t"] for algorithm in QUANT_ALGOS.values()} == {torch.float8_e4m3fn}
