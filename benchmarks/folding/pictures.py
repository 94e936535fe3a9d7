"""The demo's variants drawn with the same noise: as they are, with a table, with a basis; figures
and one picture."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_engine import demo, open_model
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.weights import parameter_count
from ppcl_engine.report.drawings.side_by_side import Column, side_by_side
from ppcl_engine.settings.assess_settings import EvaluateConfig
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.assess.evaluate import reader_of
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.atomic import read_json, replacing

DEMO = Path(demo.__file__).parent
BUNDLE, TEACHER = DEMO / "demo.ppcl.safetensors", DEMO / "teacher.safetensors"
FORMS = ("off", "table", "basis")
SHOWN, SHOWN_VARIANTS = 9, ("full", "smallest")


def pictures(folder: Path, output: Path, captions: int, steps: int) -> dict:
    """Writes folding.png beside the results. psnr: of the basis' pictures, at worst."""
    files, reports = {"off": (BUNDLE, TEACHER)}, {}
    for form in FORMS[1:]:
        path = fold(
            FoldConfig(
                path=BUNDLE,
                base=TEACHER,
                form=form,
                run=folder,
                name=f"demo_{form}",
                steps=str(steps),
                dtype="float32",
                samples=str(captions),
                device="cpu",
            )
        )
        files[form] = path, path.with_name(f"demo_{form}_base.safetensors")
        reports[form] = read_json(folder / f"demo_{form}.json")
    reading = reader_of(EvaluateConfig(model=TEACHER, run=folder, device="cpu"), TEACHER)
    texts = reading.captions(captions, seed=0)
    prompts = encode_prompts(open_codec(TEACHER), texts)
    rows, columns = [], []
    for variant in Bundle(BUNDLE).variant_names:
        drawn, parameters = {}, {}
        for form, (path, base) in files.items():
            model = open_model(path, variant, base)
            latents = draw_prompts(
                QwenImage(), model, prompts, 0, steps, 2.0, captions, f"{variant} {form}"
            )
            drawn[form], parameters[form] = reading.codec.pictures(latents), parameter_count(model)
            if variant in SHOWN_VARIANTS:
                shown = drawn[form][:SHOWN].movedim(1, -1)
                columns.append(
                    Column(
                        name=f"{variant}, {form}",
                        pictures=shown,
                        parameters=parameters[form],
                        bytes=2 * parameters[form],
                    )
                )
        right = {
            form: float(reading.score(p, texts)["character"].float().mean())
            for form, p in drawn.items()
        }
        rows.append(
            {
                "name": variant,
                "parameters": parameters,
                "identical": torch.equal(drawn["table"], drawn["off"]),
                "psnr": _psnr(drawn["basis"], drawn["off"]),
                "characters": right,
            }
        )
    _save(output / "folding.png", side_by_side(columns))
    basis = {key: reports["basis"][key] for key in ("rank", "bound", "curve")}
    sizes = {form: found["sizes"] for form, found in reports.items()}
    return {
        "captions": captions,
        "steps": steps,
        "variants": rows,
        "basis": basis,
        "files": sizes,
        "table_bytes": reports["table"]["table_bytes"],
    }


def _psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The PSNR of the worst picture, in decibels."""
    error = (ours - theirs).double().square().flatten(1).mean(1).clamp_min(1e-12)
    return float((-10 * error.log10()).min())


def _save(path: Path, sheet: torch.Tensor) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray((sheet[0] * 255).round().byte().numpy()).save(temporary, format="PNG")
