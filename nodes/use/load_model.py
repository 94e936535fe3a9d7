"""PPCL_LoadModel: loads a bundle with its base model, a standalone file, or a released pruned model."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ...ppcl_engine.settings.convert_settings import ImportConfig
from ...ppcl_engine.settings.help_texts import setting_help
from ..host.modulations import FOLDS, OFF
from ..loading import gguf
from ..loading.bundles import variant_names
from ..loading.request import AUTO, PRESETS, Request
from ..node import Node
from ..paths import NO_BASE, base_path, model_files, model_path
from .patcher import WEIGHT_DTYPES, load_patcher

FOLD_HELP = (
    "A third less memory, same speed. table: the very same pictures; a schedule that is new costs one pass over the file, "
    "once. basis: any schedule and sampler at once, changed less than the eye sees."
)


class LoadModel(Node):
    FILES = {"file": model_path, "base": base_path}
    LOOKED_UP = ("variant",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        bases = list(model_files())
        files = gguf.files_last(bases)
        return io.Schema(
            node_id="PPCL_LoadModel",
            display_name="Load Pruned Model (PPCL)",
            category="PPCL",
            description="A PPCL bundle with its base model, a pruned model in one file, or a released pruned folder.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="Bundle (*.ppcl.safetensors), standalone or released model.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NO_BASE, *bases],
                    tooltip="Of a bundle: the full model it was made from.",
                ),
                io.Combo.Input(
                    "variant",
                    options=variant_names(),
                    tooltip="Of a bundle: the size to start with.",
                ),
                io.Boolean.Input(
                    "switchable",
                    default=True,
                    tooltip="On: all sizes are loaded once and switched in no time. Off: this one alone.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    tooltip="As in Load Diffusion Model.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=AUTO,
                    tooltip="Of a released model: which blocks of the original its blocks are (LoRA, ControlNet).",
                ),
                io.String.Input(
                    "intervals",
                    default="",
                    tooltip=f'For "by intervals": {setting_help(ImportConfig, "intervals")}',
                ),
                io.Boolean.Input(
                    "legacy_text",
                    default=False,
                    tooltip=setting_help(ImportConfig, "legacy_txt_proj"),
                ),
                io.Combo.Input(
                    "fold", options=list(FOLDS), default=OFF, optional=True, tooltip=FOLD_HELP
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(
        cls, file, base, variant, switchable, weight_dtype, preset, intervals, legacy_text, fold=OFF
    ) -> io.NodeOutput:
        request = Request(
            path=model_path(file),
            base=base_path(base),
            variant=variant,
            fold=fold,
            switchable=switchable,
            preset=preset,
            intervals=intervals,
            legacy_text=legacy_text,
        )
        return io.NodeOutput(*load_patcher(request, weight_dtype))
