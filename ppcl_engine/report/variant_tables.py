"""The page's tables of variants: size and speed, and fidelity to the teacher."""

from __future__ import annotations

from ..system.numbers import bytes_text, count_text, seconds_text
from .html import NONE, Html, joined, table, tag
from .results import ACCURACIES, FIDELITY, Results


def size_table(results: Results) -> Html:
    teacher, layouts = results.teacher, results.layouts

    def row(r: dict) -> list[object]:
        variant, layout = results.plan.variant(r["name"]), layouts[r["name"]]
        memory, flops, ratio = r.get("peak_memory_bytes"), r.get("flops"), r.get("latency_ratio")
        return [
            joined([r["name"], tag("small", "fine-tuned")]) if variant.tuned else r["name"],
            len(layout.places),
            *([len(layout.sites)] if results.plan.sites else []),
            count_text(r["parameters"]),
            f"{100 * r['parameters'] / teacher['parameters']:.1f} %",
            bytes_text(r["bytes"]),
            f"{100 * flops / teacher['flops']:.1f} %" if flops and teacher.get("flops") else NONE,
            seconds_text(r["seconds_per_step"]),
            f"{ratio:.2f}×" if ratio else NONE,
            bytes_text(memory) if memory else NONE,
        ]

    heads = [
        "variant",
        "blocks",
        *(["width sites"] if results.plan.sites else []),
        "parameters",
        "of the teacher",
        "weights",
        "FLOPs",
        "time a step",
        "speed",
        "peak memory",
    ]
    return table(heads, [row(r) for r in results.evaluation["variants"]])


def fidelity_table(results: Results) -> Html:
    rows = results.evaluation["variants"]
    shown = [name for name in FIDELITY if any(row.get(name) for row in rows)]
    heads = ["variant", *(FIDELITY[name][0] for name in shown)]
    return table(
        heads,
        [[r["name"], *(_cell(r.get(name), FIDELITY[name][1]) for name in shown)] for r in rows],
        "stats",
    )


def stat_text(stat: dict | None, form: str) -> str:
    """97.0 % (95.1–98.4)"""
    if not stat:
        return NONE
    if form == "%":
        return f"{100 * stat['value']:.1f} % ({100 * stat['low']:.1f}–{100 * stat['high']:.1f})"
    return f"{form.format(stat['value'])} ({form.format(stat['low'])}–{form.format(stat['high'])})"


def _cell(stat: dict | None, form: str) -> Html:
    value, _, error = stat_text(stat, form).partition(" (")
    return joined([value, " ", tag("small", f"({error}")]) if error else joined([value])


def fidelity_text(results: Results) -> str:
    text = "Each variant against the teacher at the same seeds; in brackets 95 % intervals over samples (Wilson for what the reader recognises, otherwise bootstrap). Velocity error is "
    text += "squared and relative to the teacher's velocity (0 is identical); PSNR and SSIM compare pictures drawn from the same noise."
    if any(results.teacher.get(name) for name in ACCURACIES):
        text += " A reader recognises the character, the shape and the colours in every picture."
    return (
        text
        + " Text sensitivity is how much of the velocity changes when the caption is taken away; it should stay at the teacher's."
    )
