"""An adapted LoRA, in the host's stock loader, changes the pruned model as the engine means it."""

import shutil

import pytest

from benchmarks.lora_adaptation.training import add_lora
from ppcl_engine import open_model
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.jobs.spec import JobSpec, write_spec
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import AdaptLoraConfig
from ppcl_engine.stages.convert.adapt_lora import adapt_lora

from ....tiny.loras import write_lora
from ..forwards import engine_forward, relative_error

pytestmark = pytest.mark.parametrize("architecture", ["qwen_image", "flux1"], indirect=True)
MAPS = {
    "qwen_image": ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "txt_mlp.net.2"),
    "flux1": ("attn.to_q", "ff.net.2", "ff_context.net.2", "proj_mlp", "proj_out"),
}
VARIANTS = {"qwen_image": "smallest", "flux1": "small"}  # with projections; with fused maps
STRENGTH = 0.8


@pytest.fixture(scope="module")
def adapted(architecture, teacher, run_folder, models, host_case):
    """Of a LoRA on all blocks, for the variant with students and projections; the file lies in the
    host's folder."""
    run, weights = Run(run_folder), Weights(teacher)
    inputs = architecture.random_inputs(weights.config, 2, (1, 2, 3), 5, "cpu")
    origin = {"architecture": architecture.name, "fingerprint": weights.fingerprint}
    save_calibration(run.calibration, CalibrationSet([inputs], origin))
    path = models.loras / f"whole_{architecture.name}.safetensors"
    blocks = list(range(weights.num_blocks))
    names = MAPS[architecture.name]
    write_lora(path, teacher, blocks, names)
    made = adapt_lora(
        AdaptLoraConfig(
            model=teacher,
            run=run.folder,
            lora=path,
            variant=VARIANTS[architecture.name],
            name=f"adapted_{architecture.name}",
            updates=2,
            device="cpu",
        )
    )
    shutil.copyfile(made, models.loras / made.name)
    return models.loras / made.name


@pytest.mark.parametrize("switchable", [True, False])
def test_stock_loader(
    run_node, load, bundle, teacher, architecture, adapted, inputs, velocity, switchable
):
    variant = VARIANTS[architecture.name]
    pruned = load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)
    (changed,) = run_node(
        "LoraLoaderModelOnly", model=pruned, lora_name=adapted.name, strength_model=STRENGTH
    )
    model = open_model(bundle, variant, teacher)
    plain = engine_forward(architecture, model, inputs)
    expected = engine_forward(architecture, add_lora(model, adapted, STRENGTH), inputs)
    assert relative_error(plain, expected) > 0.01
    assert relative_error(velocity(changed), expected) < 1e-4


def test_what_the_node_shows_of_a_finished_run(pack, models, run_folder, adapted, architecture):
    settings = {"lora": "style.safetensors", "name": adapted.stem}
    write_spec(run_folder, JobSpec(stages=(("adapt-lora", settings),)))
    picture, text, name = pack("make.adapt_lora")._adapted(run_folder)
    assert picture.ndim == 4 and picture.shape[-1] == 3
    assert name == f"ppcl/{run_folder.name}-{adapted.name}" and text.startswith(f"{name}: ")
    assert (models.loras / name).read_bytes() == adapted.read_bytes()
    assert all(" as the LoRA was, " in line for line in text.splitlines()[1:])
