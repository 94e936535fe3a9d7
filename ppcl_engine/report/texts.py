"""The texts and the style sheet of a report's page."""

MAP_TEXT = (
    "One row for each variant, one cell for each block of the teacher. A student stands at the first block of its interval and "
    "does the work of the whole interval. Each interval is a switch: where it is off, the teacher's own blocks run."
)
MAP_SITES_TEXT = (
    " Marks are width sites: projections that replace a text stream (upper edge) or one FFN (text above, image below). "
    "Only sites that are really on are drawn."
)
CKA_TEXT = (
    "For each interval's first block u: how well the teacher's final image state survives when everything after u up to block k "
    "is replaced by linear maps (CKA, 1 is perfect). Below, the drop D that each further block adds."
)
INTERVAL_TEXT = (
    "Damage is the squared error of the final velocity, relative to the teacher's, with only this interval replaced: by one "
    "linear map, as detection measured it, and by the trained student (score). Stability is the share of bootstrap resamples of "
    "the calibration samples that choose this very interval."
)
DAMAGE_TEXT = (
    "What it costs to replace an interval by one linear map, for every first block and every length (darker is worse, "
    "logarithmic). The chosen ones are outlined."
)
LOSS_TEXT = "Each student learns by itself, on the teacher's own states. Faint: every update; bold: running mean."
PICTURE_TEXT = "The same caption and the same noise in every column; the teacher in the first row."
SIZE_TEXT = (
    "Weights as stored in bfloat16. Time and speed are of one forward of a calibration batch on the machine named below. "
    "Peak memory is what loading and drawing with this variant took above what the process held before."
)
TIMESTEP_TEXT = "How far the variants are from the teacher at each point between noise and picture. Bands are 95 % bootstrap intervals."
WIDTH_TEXT = (
    "Where one projection can do the work of a text stream or of an FFN in the model with all intervals on. Above, how similar the "
    "inputs of two layers are (CKA, 1 is the same up to a rotation; lighter is more similar), with each chosen text group outlined "
    "together with the full block that it reads from, and how little each FFN changes its stream. Below, every candidate: "
)
SCORE_TEXTS = {
    "damage": "the error that it adds to the final velocity in closed form, against the parameters that it saves.",
    "cka": "1 − CKA, summed over its layers, against the parameters that it saves.",
}
SCORE_NAMES = {"damage": "damage alone", "cka": "1 − CKA"}
BY_HAND_TEXT = " The plan's sites are not those that detection chose: they were named by hand."
BENCHMARK_TEXT = (
    "Prompts of public benchmarks, one picture each, drawn from the same noise by all variants. In brackets 95 % bootstrap intervals over "
    "prompts. Below, the paired difference from the teacher with its own interval: better or worse only where that leaves 0 out. "
    "The columns say -style because prompts and rules are the benchmark's and the judge is not."
)
LOST_TEXT = "In the authors' own code: {grader}. Shown are the prompts at which the variants lost most against the teacher, in the mean."

STYLE = """
:root{--ink:#1b2733;--quiet:#5c6b7a;--rule:#d9dfe5;--accent:#0072b2;--shade:#f3f6f9}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1140px;margin:0 auto;padding:56px 36px 96px}
header{border-top:5px solid var(--accent);padding-top:22px}
h1{font-size:2.3rem;line-height:1.15;letter-spacing:-.02em;margin:.1em 0 .45em;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .35em}
p{max-width:76ch;text-wrap:pretty;margin:0 0 1.1em}
section>p{color:var(--quiet)}section>p:empty{display:none}
.eyebrow{color:var(--accent);font-weight:600;margin:0}
.lead{font-size:1.16rem;line-height:1.6}.lead strong,.lead span{white-space:nowrap}
section{margin-top:60px}
.scroll{overflow-x:auto}
img.wide{display:block;width:100%;min-width:760px;height:auto}
table{border-collapse:separate;border-spacing:0}
table.numbers{width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
.numbers th,.numbers td{padding:.5em .7em;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
.numbers thead th{color:var(--quiet);font-weight:500;font-size:.82rem;white-space:normal;vertical-align:bottom;border-bottom:2px solid var(--ink);line-height:1.3}
.numbers th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:#fff}
.numbers tbody th{font-weight:650}
tbody th small{display:block;font-weight:400;color:var(--quiet)}
ul.notes{margin:12px 0 0;padding-left:1.2em;color:var(--quiet);font-size:.9rem}
.wide+.scroll,.scroll+.scroll{margin-top:18px}
.stats td{vertical-align:top}.stats tbody th{vertical-align:top}
.stats small{display:block;color:var(--quiet);font-size:.8rem}
.pictures th,.pictures td{padding:2px 3px;vertical-align:middle}
.pictures tr:first-child th{vertical-align:bottom;font-weight:400;text-align:left;font-size:.72rem;line-height:1.3;color:var(--quiet);padding-bottom:8px}
.pictures th div{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:6;overflow:hidden;overflow-wrap:anywhere}
.pictures th[scope=row],.pictures td:first-child:empty{position:sticky;left:0;background:#fff;text-align:left;padding-right:14px;font-size:.9rem;font-weight:650}
.pictures img{display:block;border-radius:3px;height:auto}
.pixels{image-rendering:pixelated}
details{margin-top:18px}summary{cursor:pointer;color:var(--accent);font-weight:600}
pre{background:var(--shade);padding:16px 18px;border-radius:6px;overflow-x:auto;font-size:.82rem;line-height:1.5}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.55em 2em;margin:0}
dt{color:var(--quiet)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:640px){main{padding:24px 18px 64px}h1{font-size:1.8rem}.lead{font-size:1.06rem}section{margin-top:44px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.9em}}
@media print{main{padding:0}section{break-inside:avoid}}
"""
