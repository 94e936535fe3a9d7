"""LoRA files read by the engine; what each kind changes is compared with ComfyUI in
`tests/comfyui/inside/host/test_lora_files.py`."""

from pathlib import Path

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.lora_files import LoraFile
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.lora_files import RANK, module_of

FLUX = architecture_named("flux1")
WIDTH = 32
QKV, ATTENTION = "double_blocks.1.img_attn.qkv", "transformer_blocks.1.attn"


def lora(folder: Path, tensors: dict) -> LoraFile:
    write_tensors(folder / "lora.safetensors", tensors)
    return LoraFile(folder / "lora.safetensors", FLUX, FLUX.tiny_config)


@pytest.mark.parametrize(
    "name",
    [
        f"diffusion_model.{QKV}",
        f"model.diffusion_model.{QKV}",
        f"transformer.{QKV}",
        QKV,
        f"base_model.model.{QKV}",
        f"base_model.model.transformer.{QKV}",
        f"lora_unet_{QKV.replace('.', '_')}",
    ],
)
def test_names_of_a_fused_map(name, tmp_path):
    tensors = module_of("kohya", name, 3 * WIDTH, WIDTH)
    file = lora(tmp_path, tensors)
    assert file.targets == tuple(f"{ATTENTION}.to_{letter}.weight" for letter in "qkv")
    whole = 2 / RANK * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    for key, rows in zip(file.targets, whole.chunk(3), strict=True):
        (pair,) = file.low_rank(key)
        assert pair.up.shape == (WIDTH, RANK) and pair.scale == pytest.approx(2 / RANK)
        torch.testing.assert_close(pair.matrix(), rows)
        torch.testing.assert_close(file.change(key, 0.5), 0.5 * rows)
    assert file.low_rank("proj_out.weight") == [] and file.change("proj_out.weight") is None


@pytest.mark.parametrize(
    "name, rows, targets",
    [
        (f"transformer.{ATTENTION}.to_out", 1, [f"{ATTENTION}.to_out.0"]),
        (f"lycoris_{ATTENTION.replace('.', '_')}_to_q", 1, [f"{ATTENTION}.to_q"]),
        ("double_blocks.1.processor.proj_lora2", 1, [f"{ATTENTION}.to_add_out"]),
        (
            "single_blocks.0.processor.qkv_lora",
            3,
            [f"single_transformer_blocks.0.attn.to_{letter}" for letter in "qkv"],
        ),
    ],
)
def test_other_spellings(name, rows, targets, tmp_path):
    tensors = module_of("kohya", name, rows * WIDTH, WIDTH)
    if "processor" in name:  # as XLabs' trainer writes pairs
        tensors = {n.replace(".lora_", "."): tensor for n, tensor in tensors.items()}
    assert lora(tmp_path, tensors).targets == tuple(f"{target}.weight" for target in targets)


def test_dora_as_peft_stores_it(tmp_path):
    """Rows of the changed weight have the norms of the file; half the strength is half the way."""
    key = f"{ATTENTION}.to_q.weight"
    norms = 1 + torch.rand(WIDTH)
    tensors = module_of("PEFT", f"transformer.{ATTENTION}.to_q", WIDTH, WIDTH)
    tensors[f"transformer.{ATTENTION}.to_q.lora_magnitude_vector"] = norms
    file, weight = lora(tmp_path, tensors), torch.randn(WIDTH, WIDTH)
    assert file.reads_base(key) and file.low_rank(key) is None
    change = file.change(key, 1.0, lambda name: weight)
    torch.testing.assert_close((weight + change).norm(dim=1), norms)
    torch.testing.assert_close(file.change(key, 0.5, lambda name: weight), 0.5 * change)


def test_what_the_model_does_not_have_is_named(tmp_path):
    tensors = {
        **module_of("kohya", f"transformer.{ATTENTION}.to_q", WIDTH, WIDTH),
        **module_of("kohya", "lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8),
        "something.weight": torch.zeros(2),
    }
    file = lora(tmp_path, tensors)
    assert file.unknown == ("something.weight", "lora_te1_text_model_encoder_layers_0_mlp_fc1")


GOOD = f"transformer.{ATTENTION}.to_q"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"img_in.weight": torch.zeros(2, 2)}, "is not a LoRA: none of its tensors"),
        (module_of("kohya", "blocks.0.self_attn.q", 8, 8), "changes nothing that flux1 has"),
        (module_of("kohya", GOOD, 64, 64), "does not fit the model's, which is 32 x 32"),
        (module_of("LoKr", GOOD, 64, 64), "does not fit the model's"),
        (module_of("OFT", GOOD, 64, 64), "does not fit the model's"),
        ({f"{GOOD}.lora_up.weight": torch.zeros(32, 2)}, "has up, which is not one whole change"),
        ({f"{GOOD}.lokr_w1": torch.zeros(2, 2)}, "has lokr_w1, which is not one whole change"),
        ({f"{GOOD}.lora_{n}.weight": torch.zeros(32) for n in "AB"}, "or damaged"),
        (
            module_of("kohya", GOOD, WIDTH, WIDTH) | {f"{GOOD}.alpha": torch.zeros(2)},
            "or damaged",
        ),
        (
            module_of("kohya", GOOD, WIDTH, WIDTH) | module_of("PEFT", GOOD, WIDTH, WIDTH),
            "has two tensors for",
        ),
        (
            module_of("kohya", GOOD, WIDTH, WIDTH)
            | module_of("PEFT", f"{ATTENTION}.to_q", WIDTH, WIDTH),
            "which are the same module; remove one",
        ),
    ],
)
def test_bad_files(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lora(tmp_path, tensors)
