"""Layouts: what stands where, which sites go off with an interval and why."""

from hypothesis import given
from hypothesis import strategies as st

from ppcl_engine.models.layout import full_layout, layout_of
from ppcl_engine.plan import FULL, Interval, Variant, WidthSite, parse_sites

from ..tiny.plans import plan_of, plans


def text(*blocks: int, fitted=None) -> tuple[WidthSite, ...]:
    return tuple(WidthSite(block=b, kind="text", fitted=(fitted or {}).get(b, ())) for b in blocks)


def on(plan, intervals=None, sites=None):
    everything = plan.everything()
    chosen = Variant(
        name="x",
        intervals=everything.intervals if intervals is None else intervals,
        sites=everything.sites if sites is None else sites,
    )
    layout = layout_of(plan, chosen)
    return {place.name: place for place in layout.places}, layout


@given(plans(), st.data())
def test_places_cover_every_block_once(plan, data):
    names = [i.name for i in plan.intervals]
    switches = [s.name for s in plan.switches]
    chosen = Variant(
        name="x",
        intervals=tuple(data.draw(st.sets(st.sampled_from(names)) if names else st.just(set()))),
        sites=tuple(data.draw(st.sets(st.sampled_from(switches)) if switches else st.just(set()))),
    )
    layout = layout_of(plan, chosen)
    covered = [block for p in layout.places for block in range(p.index, p.last + 1)]
    assert covered == list(range(plan.num_blocks))
    assert set(layout.sites) | {note.split(" is off")[0] for note in layout.notes} == set(
        chosen.sites
    )
    by_index = {p.index: p for p in layout.places}
    for place in layout.places:
        if place.text_source is not None:
            source = by_index[place.text_source]
            assert source.publishes and source.text_source is None and source.index < place.index
    assert layout_of(plan, Variant(name=FULL)) == full_layout(plan.num_blocks)
    assert not layout_of(plan, plan.everything()).notes  # with everything on, everything fits


def test_a_group_reads_the_last_full_block_and_steps_at_its_end():
    plan = plan_of(
        intervals=(Interval(first=2, last=3), Interval(first=5, last=6)), sites=text(4, 5, 6, 7)
    )
    places, _ = on(plan)
    assert places["2-3"].publishes and [p.text_source for p in places.values()] == [
        None,
        None,
        None,
        2,
        2,
        2,
        None,
        None,
    ]
    assert [name for name, p in places.items() if p.steps_text] == ["7"]


def test_giving_back_an_interval_inside_a_group_needs_projections_for_its_blocks():
    inside = Interval(first=5, last=6)
    plan = plan_of(intervals=(inside,), sites=text(4, 5, 6))
    places, layout = on(plan, intervals=())
    assert layout.sites == () and layout.notes == (
        "text:4-6 is off: no projection was trained for block 5",
    )
    assert all(place.is_teacher for place in places.values())
    plan = plan_of(intervals=(inside,), sites=text(4, 5, 6, fitted={5: ("5",), 6: ("6",)}))
    places, layout = on(plan, intervals=())
    assert layout.sites == ("text:4-6",) and [
        n for n, p in places.items() if p.text_source == 3
    ] == ["4", "5", "6"]
    assert places["6"].steps_text and not places["5"].steps_text


def test_giving_back_the_interval_before_a_group_switches_it_off():
    plan = plan_of(intervals=(Interval(first=2, last=3),), sites=text(4))
    _, layout = on(plan, intervals=())
    assert layout.notes == (
        "text:4-4 is off: the block before it (3) is not the one that it was trained behind",
    )


def test_an_ffn_site_of_a_student_goes_off_with_its_interval():
    plan = plan_of(
        intervals=(Interval(first=2, last=3),),
        sites=parse_sites("ffn_image:2 ffn_image:5", "gated"),
    )
    places, layout = on(plan)
    assert places["2-3"].projections == ("ffn_image",) and layout.sites == (
        "ffn_image:2",
        "ffn_image:5",
    )
    _, layout = on(plan, intervals=())
    assert layout.sites == ("ffn_image:5",)
    assert layout.notes == ("ffn_image:2 is off: no projection was trained for block 2",)
