"""Every kind of LoRA, by every layout of names: the engine changes a full model's weights as the
host does, and a file that LoRAs were merged into gives the host's velocity with its own loader of
them."""

import comfy.lora
import comfy.lora_convert
import pytest
import torch

from ppcl_engine.models.lora_files import LoraFile
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.convert_settings import MergeConfig
from ppcl_engine.stages.convert.merge import merge
from ppcl_engine.system.tensor_files import write_tensors

from ....tiny.lora_files import KINDS, module_of, write_lora
from ..forwards import relative_error
from .adapted import ADAPTED

pytestmark = pytest.mark.parametrize(
    "architecture", ["qwen_image", "flux1", "sd35", "z_image"], indirect=True
)
STRENGTH = 0.7
PREFIX = "diffusion_model."


def matrices(tensors: dict) -> dict[str, tuple[int, int]]:
    """Module -> size, of every map in a block."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if tensor.ndim == 2
        and name.endswith(".weight")
        and ("blocks." in name or "layers." in name)
    }


@pytest.fixture(scope="module")
def layouts(teacher, host_tensors, architecture) -> dict[str, dict]:
    """Layout -> module's name in a LoRA file -> size."""
    weights = Weights(teacher)
    fused = matrices(host_tensors)
    split = matrices({key: weights.read(key) for key in weights.keys()})
    unnamed = getattr(ADAPTED.get(architecture.name), "unnamed", "no such name")
    prefix = PREFIX if architecture.name == "z_image" else "transformer."
    return {
        "the host's": {PREFIX + name: shape for name, shape in fused.items()},
        "kohya's": {f"lora_unet_{n.replace('.', '_')}": s for n, s in fused.items()},
        "diffusers'": {prefix + name: s for name, s in split.items() if unnamed not in name},
    }


@pytest.fixture(scope="module")
def patched(load, teacher):
    """What the host makes of its weights with a LoRA's tensors, by its names; only those that it
    changes."""
    model = load(teacher.name)
    stored = model.model.state_dict()
    names = comfy.lora.model_lora_keys_unet(model.model, {})

    def run(tensors: dict) -> dict[str, torch.Tensor]:
        new = {}
        found = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), names, False)
        for target, patch in found.items():
            key, offset = (target, None) if isinstance(target, str) else target[:2]
            weight = new.setdefault(key.removeprefix(PREFIX), stored[key].clone())
            patches = [(STRENGTH, patch, 1.0, offset, None)]
            comfy.lora.calculate_weight(patches, weight, key)
        return new

    return run


@pytest.mark.parametrize("layout", ["the host's", "kohya's", "diffusers'"])
def test_a_file_of_every_kind(architecture, teacher, layouts, layout, patched, tmp_path):
    weights = Weights(teacher)
    # the host takes no bias by names of q, k and v
    names = [kind for kind in KINDS if not (kind.endswith("bias") and layout == "diffusers'")]
    path, tensors = tmp_path / "lora.safetensors", {}
    torch.manual_seed(1)
    for number, (module, shape) in enumerate(layouts[layout].items()):
        tensors |= module_of(names[number % len(names)], module, *shape)
    write_tensors(path, tensors)
    file = LoraFile(path, architecture, weights.config)
    expected = patched(tensors)
    changed = {}
    for key in weights.keys():
        change = file.change(key, STRENGTH, weights.read)
        changed[key] = weights.read(key) + (0 if change is None else change)
    ours = {
        name: source.read()
        for name, source in comfyui_sources(
            architecture,
            {k: Source(tuple(t.shape), lambda t=t: t) for k, t in changed.items()},
        ).items()
    }
    assert not file.unknown and len(file.modules) >= len(layouts[layout])
    touched = {architecture.to_comfyui(key, changed).name for key in file.targets}
    assert touched == expected.keys()
    for name, weight in expected.items():
        assert relative_error(ours[name], weight) < 1e-6, name


MERGED = ("kohya", "LoKr", "DoRA by columns", "LoHa", "DoRA by rows")


@pytest.mark.parametrize("variant", ["full", "smallest"])
def test_a_merged_file(
    architecture, teacher, bundle, models, layouts, load, run_node, velocity, tmp_path, variant
):
    """As the host's own LoRA loader behind the model; of a pruned model, on students and cut maps."""
    name = f"{architecture.name}_{variant}_merged.safetensors"
    lora = write_lora(models.loras / name, layouts["the host's"], MERGED)
    config = MergeConfig(
        path=teacher if variant == "full" else bundle,
        base=None if variant == "full" else teacher,
        variant=None if variant == "full" else variant,
        lora=(f"{lora}:{STRENGTH}",),
        run=tmp_path,
        store="float32",
    )
    folder = models.diffusion_models if variant == "full" else models.ppcl
    merge(config).replace(folder / name)
    alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
    (expected,) = run_node(
        "LoraLoaderModelOnly", model=alone, lora_name=name, strength_model=STRENGTH
    )
    expected, actual = velocity(expected), velocity(load(name))
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(velocity(alone), expected) > 0.02
