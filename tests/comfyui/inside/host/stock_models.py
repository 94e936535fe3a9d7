"""The host's own models: what builds their names and shapes, with no weights."""

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_heads": -1,
    "num_head_channels": 64,
}
UNET |= {"use_spatial_transformer": True}
SD = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_classes": "sequential",
}
DOUBLE_STREAM = {
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
}
FLUX = DOUBLE_STREAM | {"vec_in_dim": 768, "context_in_dim": 4096, "theta": 10000, "patch_size": 2}
HUNYUAN = DOUBLE_STREAM | {
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "theta": 256,
    "patch_size": [1, 2, 2],
}
HUNYUAN |= {
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
}
CHROMA = DOUBLE_STREAM | {"context_in_dim": 4096, "theta": 10000, "patch_size": 2}
CHROMA |= {"in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
Z_IMAGE = {
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
}
Z_IMAGE |= {
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "z_image_modulation": True,
    "qk_norm": True,
}
Z_IMAGE |= {"in_channels": 16, "patch_size": 2, "ffn_dim_multiplier": 8 / 3}
# what a class's constructor asks for beyond its defaults and what the config class says itself
ASKED = {
    "SD15": SD,
    "SD15_instructpix2pix": SD | {"in_channels": 8},
    "SD20": SD,
    "SD21UnclipL": SD | {"num_classes": "sequential"},
    "SDXL": SDXL,
    "SDXL_instructpix2pix": SDXL | {"in_channels": 8},
    "Flux": FLUX | {"txt_ids_dims": []},
    "FluxInpaint": FLUX | {"in_channels": 96, "txt_ids_dims": []},
    "FluxSchnell": FLUX | {"txt_ids_dims": []},
    "Flux2": FLUX
    | {
        "in_channels": 128,
        "out_channels": 128,
        "hidden_size": 6144,
        "num_heads": 48,
        "mlp_ratio": 3.0,
        "vec_in_dim": None,
        "context_in_dim": 15360,
        "axes_dim": [32] * 4,
        "patch_size": 1,
        "qkv_bias": False,
        "ops_bias": False,
        "guidance_embed": True,
        "global_modulation": True,
        "mlp_silu_act": True,
        "txt_ids_dims": [3],
    },
    "HunyuanVideo": HUNYUAN | {"vision_in_dim": None, "meanflow_sum": False},
    "HunyuanVideoI2V": HUNYUAN | {"in_channels": 33, "vision_in_dim": None, "meanflow_sum": False},
    "HunyuanImage21": HUNYUAN
    | {"patch_size": [1, 1], "axes_dim": [64, 64], "vision_in_dim": None, "meanflow_sum": False},
    "Chroma": CHROMA | {"txt_ids_dims": [], "vec_in_dim": None},
    "ZImage": Z_IMAGE,
    "Lumina2": Z_IMAGE
    | {
        "dim": 2304,
        "n_heads": 24,
        "n_kv_heads": 8,
        "axes_dims": [32] * 3,
        "z_image_modulation": False,
    },
}
SMALL = {
    "Flux": {"depth": 1, "depth_single_blocks": 1},
    "WAN21_T2V": {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2},
}
# half a minute each: they fill their weights while they are built
SLOW = {"Stable_Cascade_C", "Stable_Cascade_B"}
MUST = {
    "0.3.75": {
        "SD15",
        "SDXL",
        "Flux",
        "WAN21_T2V",
        "HunyuanVideo",
        "LTXV",
        "Lumina2",
        "QwenImage",
        "SD3",
        "AuraFlow",
    },
    "0.30.0": {"Flux2", "ZImage", "Krea2", "Chroma", "WAN22_T2V", "HunyuanImage21"},
}
MUST["0.30.0"] |= MUST["0.3.75"]
LATER = {"txt_ids_dims", "meanflow_sum"}  # 0.3.75 does not know them


def stock_models() -> list[type]:
    """The host's own classes, without this pack's."""
    return [
        known for known in comfy.supported_models.models if not known.__name__.startswith("PPCL")
    ]


def empty_tensors(known: type) -> dict[str, torch.Tensor]:
    """Names and shapes of the class's transformer or U-Net, on the meta device, without weights."""
    config = known({**ASKED.get(known.__name__, {}), **known.unet_config})
    for name in LATER & config.unet_config.keys() if not recent() else ():
        del config.unet_config[name]
    config.set_inference_dtype(torch.float32, None)
    with torch.device("meta"):
        return config.get_model({}, "", device=torch.device("meta")).diffusion_model.state_dict()


def recent() -> bool:
    return any(known.__name__ == "Krea2" for known in stock_models())
