"""Plans for property tests: everything that a plan may hold, and nothing that it refuses."""

import contextlib

from hypothesis import strategies as st

from ppcl_engine.architectures import architecture_named
from ppcl_engine.plan import FORMS, Interval, PruningPlan, Variant, WidthSite

KINDS = architecture_named("qwen_image").site_kinds({}, 0)
NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc",), exclude_characters="/\\"),
    min_size=1,
    max_size=255,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def plan_of(**parts) -> PruningPlan:
    base = {
        "architecture": "qwen_image",
        "config": {"num_layers": 10},
        "num_blocks": 10,
        "fingerprint": "f" * 64,
    }
    return PruningPlan(**{**base, **parts})


def fitting(
    blocks: int, intervals: tuple[Interval, ...], drawn: list[WidthSite]
) -> tuple[WidthSite, ...]:
    """The sites that a plan of these intervals takes, one after the other."""
    taken: tuple[WidthSite, ...] = ()
    for site in drawn:
        with contextlib.suppress(ValueError):
            taken = plan_of(num_blocks=blocks, intervals=intervals, sites=(*taken, site)).sites
    return taken


@st.composite
def plans(draw) -> PruningPlan:
    blocks = draw(st.integers(2, 30))
    cuts = sorted(draw(st.sets(st.integers(0, blocks - 1), max_size=8)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    intervals = tuple(
        Interval(
            first=u,
            last=v,
            score=draw(st.none() | FINITE),
            stability=draw(st.none() | st.floats(0, 1)),
            parameters=draw(st.none() | st.integers(0, 1 << 53)),
            correction=draw(st.sampled_from(["none", "affine", "16"])),
        )
        for u, v in pairs
    )
    names = [i.name for i in intervals]
    chosen = st.lists(st.sampled_from(names), unique=True).map(tuple) if names else st.just(())
    variant = st.builds(
        Variant,
        name=NAMES,
        intervals=chosen,
        flops=st.none() | FINITE,
        damage=st.none() | FINITE,
    )
    site = st.builds(
        WidthSite,
        block=st.integers(0, blocks - 1),
        kind=st.sampled_from(KINDS),
        form=st.sampled_from(FORMS),
        score=st.none() | FINITE,
        fitted=st.lists(st.sampled_from(["1", "2"]), max_size=2).map(tuple),
    )
    return plan_of(
        config={"num_layers": blocks},
        num_blocks=blocks,
        intervals=draw(st.permutations(intervals).map(tuple)),
        sites=fitting(blocks, intervals, draw(st.lists(site, max_size=6))),
        variants=tuple(draw(st.lists(variant, max_size=3, unique_by=lambda v: v.name))),
        provenance=draw(st.dictionaries(st.text(), st.text())),
    )
