"""The page of a report: one HTML file with everything in it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch

from ..system.numbers import count_text, duration_text
from .html import NONE, Html, document, image, joined, table, tag
from .results import Results
from .texts import (
    CKA_TEXT,
    DAMAGE_TEXT,
    INTERVAL_TEXT,
    LOSS_TEXT,
    MAP_SITES_TEXT,
    MAP_TEXT,
    PICTURE_TEXT,
    SIZE_TEXT,
    TIMESTEP_TEXT,
)
from .variant_tables import fidelity_table, fidelity_text, size_table, stat_text
from .width_section import WidthResults, notes_list, site_table, width_text

THUMBNAIL = 192  # pixels, the longer side of a picture in the page


def page(
    results: Results,
    drawings: dict[str, bytes],
    seconds: float | None,
    benchmarks: Sequence[Html] = (),
) -> str:
    """`benchmarks`: the sections on public benchmarks, where the run was judged on any."""
    source = results.plan.provenance.get("source_model") or results.plan.architecture
    *sections, facts = _sections(results, drawings, seconds)
    body = [
        tag(
            "header",
            tag("p", "PPCL pruning report", class_="eyebrow"),
            tag("h1", source),
            tag("p", _lead(results), class_="lead"),
        ),
        *sections,
        *benchmarks,
        facts,
    ]
    return document(f"{source}: PPCL report", *body)


def _section(title: str, text: str | Html, *content: Html) -> Html:
    body = joined(content)
    return tag("section", tag("h2", title), tag("p", text), body) if body else Html()


def _sections(results: Results, drawings: dict[str, bytes], seconds: float | None) -> list[Html]:
    def figure(name: str, alt: str) -> Html:
        return (
            tag("div", image(drawings[name], alt, class_="wide"), class_="scroll")
            if name in drawings
            else Html()
        )

    return [
        _section(
            "Layer map",
            MAP_TEXT + (MAP_SITES_TEXT if results.plan.sites else ""),
            figure("layer_map", "layer map: a row a variant, a cell a teacher block"),
            notes_list(results.layouts),
        ),
        _section(
            "Where intervals end",
            CKA_TEXT,
            figure("cka_curves", "CKA curves of the chosen intervals"),
        ),
        _section("Intervals", INTERVAL_TEXT, _interval_table(results), _explanation(results)),
        _section(
            "Damage of every possible interval",
            DAMAGE_TEXT,
            figure("damage_map", "damage of every pair of blocks"),
        ),
        _section(
            "Training of the students",
            LOSS_TEXT,
            figure("loss_curves", "training loss of each interval's student"),
        ),
        *(
            [_section("Width", width_text(results.width), *_width(results.width, figure))]
            if results.width
            else []
        ),
        _section("Pictures", PICTURE_TEXT, _picture_grid(results)),
        _section("Size and speed", SIZE_TEXT, size_table(results)),
        _section("Fidelity", fidelity_text(results), fidelity_table(results)),
        _section(
            "Velocity error by timestep",
            TIMESTEP_TEXT,
            figure("velocity_error", "velocity error by timestep"),
        ),
        _section("What was run", "", _facts(results, seconds)),
    ]


def _width(width: WidthResults, figure: Callable[[str, str], Html]) -> list[Html]:
    return [
        figure(
            "width_alignment",
            "alignment of the text of every two layers, and of each FFN's input and output",
        ),
        figure("width_candidates", "candidate sites: score against parameters saved"),
        site_table(width),
    ]


def _lead(results: Results) -> Html:
    """The result in a few sentences."""
    plan, rows = results.plan, results.students
    removed = sum(interval.removed for interval in plan.intervals)
    count = len(plan.intervals)
    text = f"{count} {'interval' if count == 1 else 'intervals'} of neighbouring blocks can each be replaced by one student; "
    text += f"with all of them on, {plan.num_blocks - removed} blocks do the work of {plan.num_blocks}. "
    if sites := len(plan.switches):
        text += f"{sites} {'width site' if sites == 1 else 'width sites'} can become projections besides. "
    if not rows:
        return joined([text])
    small = min(rows, key=lambda row: row["parameters"])
    share = f"{100 * small['parameters'] / results.teacher['parameters']:.0f} % of the parameters"
    parts = [
        text,
        "The smallest variant, ",
        tag("strong", small["name"]),
        ", has ",
        tag("strong", share),
    ]
    if small.get("latency_ratio"):
        parts += [", runs ", tag("strong", f"{small['latency_ratio']:.2f}×"), " as fast"]
    if small.get("character_accuracy"):
        right, before = small["character_accuracy"], results.teacher.get("character_accuracy")
        parts += [" and draws ", tag("strong", stat_text(right, "%")), " of characters right"]
        parts += [", the teacher ", tag("span", stat_text(before, "%"))] if before else []
    elif small.get("psnr"):
        parts += [
            " and draws the teacher's pictures to within ",
            tag("strong", f"{stat_text(small['psnr'], '{:.1f}')} dB"),
        ]
    return joined([*parts, "."])


def _interval_table(results: Results) -> Html:
    rows = []
    for i in results.plan.intervals:
        loss = results.losses.get(i.name)
        measured = next(
            (
                r
                for r in results.detection["intervals"]
                if (r["first"], r["last"]) == (i.first, i.last)
            ),
            {},
        )
        predicted = measured.get("score")
        rows.append(
            [
                f"{i.first}–{i.last}",
                i.first,
                i.last,
                i.removed,
                NONE if predicted is None else f"{predicted:.4f}",
                NONE if i.score is None else f"{i.score:.4f}",
                NONE if i.stability is None else f"{100 * i.stability:.0f} %",
                NONE if i.parameters is None else count_text(i.parameters),
                i.correction,
                NONE if loss is None else f"{float(loss[-max(1, len(loss) // 20) :].median()):.4f}",
            ]
        )
    heads = [
        "interval",
        "first",
        "last",
        "blocks saved",
        "damage, linear map",
        "damage score",
        "stability",
        "student",
        "correction",
        "final loss",
    ]
    return table(heads, rows) if rows else Html()


def _explanation(results: Results) -> Html:
    lines = results.detection.get("explain", [])
    return (
        tag(
            "details",
            tag("summary", "Why each interval ends where it does"),
            tag("pre", "\n".join(lines)),
        )
        if lines
        else Html()
    )


def _picture_grid(results: Results) -> Html:
    captions, names = results.evaluation["captions_shown"], results.pictured
    if not captions or not names:
        return Html()
    width = max(72, min(230, 936 // len(captions) - 6))
    head = [
        tag("td"),
        *(
            tag("th", tag("div", caption, title=caption, style=f"width:{width}px"), scope="col")
            for caption in captions
        ),
    ]
    rows = [tag("tr", *head)]
    for name in names:
        cells = [
            tag("td", _thumbnail(p, f"{name}: {c}", width))
            for p, c in zip(results.pictures[name], captions, strict=False)
        ]
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    return tag("div", tag("table", *rows, class_="pictures"), class_="scroll")


def _thumbnail(picture: torch.Tensor, alt: str, width: int) -> Html:
    """picture: uint8 [3, height, width]"""
    from PIL import Image

    thumbnail = Image.fromarray(picture.movedim(0, -1).contiguous().numpy())
    small = max(thumbnail.size) < 128
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "PNG")
    return image(buffer.getvalue(), alt, width=width, **({"class_": "pixels"} if small else {}))


def _facts(results: Results, seconds: float | None) -> Html:
    """How the run was made. seconds: it took in all, where known."""
    plan, run = results.plan, results.evaluation
    methods = {
        "budget": "dynamic programme on measured damage",
        "ppcl": "greedy rule on CKA differences (the paper's)",
    }
    settings = {k: v for k, v in results.settings.items() if k not in ("calibration", "probes")}
    versions = ", ".join(
        f"{name} {version}" for name, version in (run.get("versions") or {}).items()
    )
    chosen = str(results.detection.get("method", ""))
    facts = {
        "Teacher": f"{plan.provenance.get('source_model', '')} ({plan.architecture}, {plan.num_blocks} blocks, fingerprint {plan.fingerprint[:12]})",
        "Detection": methods.get(chosen, chosen),
        "Detection settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "Teacher passes": _passes(results),
        "Calibration": ", ".join(
            [
                f"{k} {v}"
                for k, v in results.calibration.items()
                if k not in ("architecture", "fingerprint")
            ]
            + [f"hash {plan.provenance.get('calibration', '')[:12]}"]
        ),
        "Pictures": f"{run['captions']} captions, {run['steps']} steps, guidance {run['guidance']}, seed {run['seed']}",
        "Machine": f"{run['machine']}, {run['device']}",
        "Versions": versions,
        "Time": ", ".join(
            [
                *([f"{duration_text(seconds)} in all"] if seconds else []),
                f"{duration_text(run['seconds'])} of evaluation",
            ]
        ),
        **{
            k.replace("_", " ").capitalize(): v
            for k, v in plan.provenance.items()
            if k not in ("source_model", "calibration", "method")
        },
    }
    return tag(
        "dl",
        *(
            joined([tag("dt", name), tag("dd", value)])
            for name, value in facts.items()
            if value not in ("", None)
        ),
    )


def _passes(results: Results) -> str:
    passes = results.detection.get("block_passes_per_batch")
    return f"{passes:,} block passes a batch for detection".replace(",", " ") if passes else ""
