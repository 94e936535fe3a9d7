"""The two forms of an FFN projection at equal parameters: the paper's x + P(x), and P inside norm,
modulation and gate.

On the full teacher, no interval replaced. Sites of each form are chosen by measured damage until
the same share of the parameters is left; the damage of all of them together is taken on samples
that nothing saw, with closed forms alone and after training, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ppcl_engine.algorithms.detection.damage import Damage
from ppcl_engine.algorithms.resampling import ratio_estimate
from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.plan import PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectConfig, DetectWidthConfig, DistillWidthConfig
from ppcl_engine.stages.inputs import open_plan, open_teacher
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_text

from .shared import output, teachers

FORMS = {"paper": "paper", "gated": "gated", "cheaper of both at each site": "best"}
SHARES = (0.9, 0.8, 0.7)
SAMPLES, HELD_OUT, BATCH = 480, 240, 48
UPDATES, RATE = 60, 1e-3


def measure(chosen) -> dict:
    samples, held_out = (SAMPLES, HELD_OUT) if not chosen.quick else (BATCH, BATCH)
    with tempfile.TemporaryDirectory() as place:
        common = {"model": chosen.teacher, "run": Path(place) / "base", "device": "cpu"}
        teacher = open_teacher(DetectConfig(**common))
        calibration = teachers.rendered(chosen.teacher, teacher.weights, samples, BATCH, seed=0)
        unseen = teachers.rendered(
            chosen.teacher, teacher.weights, held_out, BATCH, seed=1
        ).all_inputs()
        rows = []
        for share in SHARES if not chosen.quick else SHARES[:1]:
            for name, form in FORMS.items():
                run = _run(Path(place) / f"{form}_{share}", teacher, calibration)
                rows.append(_row(chosen, name, form, share, run, teacher, unseen))
    return {
        "teacher": teachers.describe(chosen.teacher, teacher.weights),
        "rows": rows,
        "updates": UPDATES,
    }


def _run(folder: Path, teacher: Teacher, calibration) -> Run:
    run = Run(folder)
    save_calibration(run.calibration, calibration)
    plan = PruningPlan(
        architecture=teacher.architecture.name,
        config=teacher.config,
        num_blocks=teacher.num_blocks,
        fingerprint=teacher.weights.fingerprint,
    )
    write_text(run.plan, plan.to_json())
    return run


def _row(
    chosen, name: str, form: str, share: float, run: Run, teacher: Teacher, unseen: list
) -> dict:
    common = {"model": chosen.teacher, "run": run.folder, "device": "cpu"}
    kinds = "ffn_image ffn_text"
    detect_width(DetectWidthConfig(**common, share=share, form=form, kinds=kinds, samples=48))
    taken = [c for c in read_json(run.width)["candidates"] if c["chosen"]]
    found = {
        "form": name,
        "share": share,
        "sites": len(taken),
        "saved": sum(c["saving"] for c in taken),
    }
    found["explained"] = sum(c["explained"][0] for c in taken) / len(taken)
    updates = UPDATES if not chosen.quick else 2
    for stage, rounds in (("closed", 0), ("trained", 1)):
        if rounds:  # another schedule than the closed form's file was saved with
            for path in run.projections.iterdir():
                path.unlink()
        distill_width(
            DistillWidthConfig(
                **common, rounds=rounds, updates=updates, learning_rate=RATE, give_back=False
            )
        )
        found[stage] = _damage(common, run, teacher, unseen)
    print(
        f"\n{name}, {share:.0%}: {found['closed']['value']:.4f} -> {found['trained']['value']:.4f}",
        flush=True,
    )
    return found


def _damage(common: dict, run: Run, teacher: Teacher, unseen: list) -> dict:
    plan = open_plan(DetectConfig(**common), teacher.weights)
    students = RunStudents(run, teacher.config, teacher.architecture)
    with torch.no_grad():
        error, power = Damage(teacher, students, plan, unseen).per_sample(
            layout_of(plan, plan.everything())
        )
    return ratio_estimate(error, power, seed=0)


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("width_forms", __doc__)
    parser.add_argument("--teacher", type=Path, default=teachers.BUNDLED)
    chosen = output.parse(parser, arguments)
    values = measure(chosen)
    text = "{value:.4f} ({low:.4f}-{high:.4f})".format_map
    lines = [
        [
            f"{r['form']}, {r['share']:.0%} left",
            str(r["sites"]),
            f"{r['saved'] / 1e6:.2f}",
            f"{r['explained']:.2f}",
            text(r["closed"]),
            text(r["trained"]),
        ]
        for r in values["rows"]
    ]
    header = [
        "form",
        "sites",
        "saved, M",
        "variance explained",
        "damage, closed form",
        "damage, trained",
    ]
    output.print_table("FFN projections at equal parameters", header, lines)
    return output.write("width_forms", chosen, values)


if __name__ == "__main__":
    main()
