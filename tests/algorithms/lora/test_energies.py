"""Where a LoRA's energy is, and what became of it."""

import pytest

from ppcl_engine.algorithms.lora.energies import OUTSIDE, energies, share_text
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.lora_files import LoraFile
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, WidthSite
from ppcl_engine.report.drawings.lora_map import lora_map

from ...tiny.loras import write_lora

MAPS = ("attn.to_q", "img_mlp.net.2")


def test_energy_by_block_and_fate(tmp_path, teacher_file):
    weights = Weights(teacher_file)
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=2),),
        sites=(WidthSite(block=4, kind="ffn_image"),),
    )
    path = write_lora(tmp_path / "x.safetensors", teacher_file, [1, 2, 4], MAPS, ("img_in",))
    lora = LoraFile(path, weights.architecture, weights.config)
    layout = layout_of(plan, plan.everything())
    rows, uncounted = energies(lora, weights.architecture, weights.config, layout)
    found = {row.block: row for row in rows}
    prefix = "transformer_blocks.2."
    whole = [float(lora.change(f"{prefix}{name}.weight").square().sum()) for name in MAPS]
    assert found[2].removed == pytest.approx(sum(whole), rel=1e-5) and not found[2].reached
    assert found[1].reached == found[1].total > 0 and found[OUTSIDE].reached > 0
    assert found[4].projected > 0 and found[4].reached > 0 and uncounted == 0
    total = sum(row.total for row in rows)
    share = f"{100 * found[2].removed / total:.0f} % belongs to removed blocks"
    assert share in share_text(rows, 0) and "(3 tensors not counted)" in share_text(rows, 3)
    assert lora_map("a $LoRA$", rows, 6).startswith(b"\x89PNG")
