"""Names in LoRA files: which part of a change a tensor holds, and which tensors of the full model a
module changes, however the file's trainer spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..architectures import Architecture, Part
from .stored_layout import PREFIXES
from .weights import expected_shapes

DOTTED = (*PREFIXES, "base_model.model.", "unet.")
"""what trainers put before a module's name; in any order"""
UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
"""the same before a name whose dots became underscores"""
LEAVES = ("weight", "scale")
"""tensors that a module's name stands for; FLUX' norms have a scale"""
FIELDS = {
    **{
        f"{ending}{of}": field
        for ending, field in ((".lora_up", "up"), (".lora_down", "down"))
        for of in (".weight", "")
    },
    **{
        f".lora_{letter}{of}": field
        for letter, field in (("B", "up"), ("A", "down"))
        for of in (".weight", "", ".default.weight", ".default")
    },
    **{
        f"{before}{field}.weight": field
        for before in (".lora.", "_lora.", ".lora_linear_layer.")
        for field in ("up", "down")
    },
    ".lora_mid.weight": "mid",
    **{f".{field}": field for field in ("alpha", "dora_scale", "diff", "diff_b", "set_weight")},
    **{
        f".lora_magnitude_vector{of}": "magnitude"
        for of in ("", ".weight", ".default", ".default.weight")
    },
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".hada_{w}": f"hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{w}": f"lokr_{w}" for w in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    **{f".{w}.weight": f"glora_{w}" for w in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
}
"""ending of a tensor's name -> which part of its module's change it is"""
ENDINGS = sorted(FIELDS, key=len, reverse=True)
FLUX_SPELLINGS = (
    (".processor.qkv_lora1", ".img_attn.qkv_lora"),
    (".processor.qkv_lora2", ".txt_attn.qkv_lora"),
    (".processor.proj_lora1", ".img_attn.proj_lora"),
    (".processor.proj_lora2", ".txt_attn.proj_lora"),
    (".processor.qkv_lora", ".linear1_qkv_lora"),
    (".processor.proj_lora", ".linear2_lora"),
)
"""how XLabs' trainer names modules -> by ComfyUI's names"""
OTHER_MODULES = {
    "flux1": (("ff.net.0.proj", "ff.linear_in"), ("ff.net.2", "ff.linear_out")),
    "sd35": (),
    "qwen_image": (),
    "z_image": (),
}
"""architecture -> (a module's name in diffusers, as some trainers write it)"""


@dataclass(frozen=True)
class Target:
    """The tensors of the full model that a module of a LoRA changes, by diffusers' names."""

    parts: Mapping[str, Part]
    """tensor -> which rows of the module's whole change are its own"""
    shape: tuple[int, ...]
    """of the whole"""

    def bias(self, shapes: Mapping[str, tuple[int, ...]]) -> Target | None:
        """The same for the biases of these weights; None where they have none."""
        parts = {key.removesuffix("weight") + "bias": part for key, part in self.parts.items()}
        return Target(parts, self.shape[:1]) if parts.keys() <= shapes.keys() else None


def field_of(architecture: Architecture, name: str) -> tuple[str, str] | None:
    """A tensor of a LoRA file -> (its module's name in the file, which part of the change it is);
    None where its name is not a LoRA's."""
    if architecture.name == "flux1":
        for theirs, ours in FLUX_SPELLINGS:
            name = name.replace(theirs, ours)
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    return None if ending is None else (name.removesuffix(ending), FIELDS[ending])


class ModuleNames:
    """All names that a LoRA may have for the modules of a full model."""

    def __init__(self, architecture: Architecture, config: dict):
        self.shapes = expected_shapes(architecture, config)
        self._targets: dict[str, Target] = {}
        fused: dict[str, dict[str, Part]] = {}
        for key, shape in self.shapes.items():
            part = architecture.to_comfyui(key, self.shapes)
            fused.setdefault(part.name, {})[key] = part
            own = Target({key: Part(key)}, shape)
            for name in _spellings(architecture, key):
                self._targets[name] = own
        for name, parts in fused.items():
            self._add_fused(name, parts)
        self._flat = {name.replace(".", "_"): target for name, target in self._targets.items()}

    def target(self, name: str) -> Target | None:
        """What a module changes; None where the model does not have it."""
        for prefix in UNDERSCORED:
            if name.startswith(prefix):
                return self._flat.get(name.removeprefix(prefix))
        while prefix := next((p for p in DOTTED if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        return self._targets.get(name)

    def _add_fused(self, name: str, parts: dict[str, Part]) -> None:
        """By ComfyUI's name, which several tensors may share."""
        target = self._whole(parts)
        for spelling in _modules(name):
            self._targets.setdefault(spelling, target)
        if name.endswith(".linear1.weight"):  # FLUX' single blocks: q, k and v without the MLP
            attention = {
                key: Part(name, part.pieces, 3)
                for key, part in parts.items()
                if max(part.pieces) < 3
            }
            width = target.shape[1]
            whole = Target(attention, (3 * width, width))
            self._targets[name.removesuffix(".weight") + "_qkv"] = whole

    def _whole(self, parts: dict[str, Part]) -> Target:
        key, part = next(iter(parts.items()))
        rows, *others = self.shapes[key] or (1,)
        shape = (rows // len(part.pieces) * part.of, *others) if part.of > 1 else self.shapes[key]
        return Target(parts, shape)


def _spellings(architecture: Architecture, key: str) -> list[str]:
    """Names of the module of diffusers' tensor."""
    names = _modules(key)
    others = (("to_out.0", "to_out"), *OTHER_MODULES.get(architecture.name, ()))
    for ours, theirs in others:
        names += [name.replace(ours, theirs) for name in names if ours in name]
    return names


def _modules(key: str) -> list[str]:
    """The tensor's own name, and its module's where that means this tensor."""
    module, _, leaf = key.rpartition(".")
    return [key, module] if leaf in LEAVES else [key]
