"""PruningPlan: JSON both ways, and what cannot be applied is refused by name."""

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given

from ppcl_engine.plan import (
    FULL,
    Interval,
    Variant,
    WidthSite,
    parse_intervals,
    parse_sites,
    plan_from_json,
)

from ..tiny.plans import plan_of, plans

PLAN = plan_of(
    intervals=(Interval(first=1, last=3), Interval(first=5, last=6, correction="affine")),
    sites=(WidthSite(block=8, kind="text"),),
    variants=(
        Variant(name="large", intervals=("5-6",), parameters=90),
        Variant(name="small", intervals=("1-3", "5-6"), parameters=70),
    ),
)


@given(plans())
def test_json_there_and_back(plan):
    assert plan_from_json(plan.to_json()) == plan


def test_an_interval_includes_both_ends():
    interval = Interval(first=3, last=5)
    assert (interval.name, interval.removed, list(interval.blocks)) == ("3-5", 2, [3, 4, 5])


REFUSED = {
    "overlap": (
        {"intervals": (Interval(first=4, last=6), Interval(first=1, last=4))},
        "1-4 and 4-6 overlap",
    ),
    "out of range": ({"intervals": (Interval(first=8, last=10),)}, "8-10 is not inside blocks 0-9"),
    "a single block": ({"intervals": (Interval(first=8, last=8),)}, "8-8 .* at least two blocks"),
    "negative": ({"intervals": (Interval(first=-1, last=2),)}, "-1-2 is not inside"),
    "unknown kind": (
        {"sites": (WidthSite(block=1, kind="heads"),)},
        "'heads' is unknown; known: text",
    ),
    "unknown form": (
        {"sites": (WidthSite(block=1, kind="ffn_text", form="x"),)},
        "form 'x' is unknown",
    ),
    "site out of range": (
        {"sites": (WidthSite(block=10, kind="text"),)},
        "text:10: there are blocks 0-9",
    ),
    "site twice": (
        {"sites": (WidthSite(block=1, kind="text"), WidthSite(block=1, kind="text"))},
        "text:1 .* twice",
    ),
    "no full block before": (
        {"sites": (WidthSite(block=0, kind="text"),)},
        "text:0-0 has no full block before it",
    ),
    "interval cut": (
        {"intervals": (Interval(first=2, last=3),), "sites": (WidthSite(block=3, kind="text"),)},
        "text:3-3 cuts interval 2-3",
    ),
    "inside an interval": (
        {
            "intervals": (Interval(first=2, last=3),),
            "sites": (WidthSite(block=3, kind="ffn_image"),),
        },
        "block 3 is inside interval 2-3, whose student is block 2",
    ),
    "replaced twice": (
        {"sites": (WidthSite(block=3, kind="ffn_text"), WidthSite(block=3, kind="text"))},
        "ffn_text:3: a text group replaces this FFN",
    ),
    "variant of no site": (
        {"variants": (Variant(name="x", sites=("text:1-2",)),)},
        "'text:1-2' is not in the plan",
    ),
    "variant of nothing": (
        {"variants": (Variant(name="x", intervals=("1-2",)),)},
        "'1-2' is not in the plan",
    ),
    "variants of one name": (
        {"variants": (Variant(name="x"), Variant(name="y"), Variant(name="x"))},
        "variant x is there twice; name it once",
    ),
    "newer version": ({"version": 2}, "format 2 is not 1; update"),
}


@pytest.mark.parametrize("parts, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_applied_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**parts)


def edited(**changes) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | changes)


BAD_JSON = {
    "not JSON": ("{", "file: not JSON"),
    "a list": ("[]", "file: a plan is a JSON object"),
    "unknown field": (edited(speed=1), "unknown field 'speed'; known: architecture"),
    "unknown field of an interval": (
        edited(intervals=[{"first": 1, "last": 2, "colour": 0}]),
        r"intervals\[0\]: unknown field 'colour'",
    ),
    "missing field of an interval": (
        edited(intervals=[{"first": 1}]),
        r"file: intervals\[0\]: the field 'last' is missing",
    ),
    "intervals that are words": (
        edited(intervals=["1-2"]),
        r"intervals\[0\] should be an object, not '1-2'",
    ),
    "intervals that are no list": (edited(intervals=7), "intervals should be a valid array, not 7"),
    "words for numbers": (
        edited(intervals=[{"first": "1", "last": "2"}]),
        r"file: intervals\[0\].first should be a valid integer, not '1'",
    ),
    "nested 20,000 deep": (
        edited()[:-1] + ', "x": ' + "[" * 20000 + "]" * 20000 + "}",
        "file: not JSON .nested more",
    ),
    "ten million blocks": (
        edited(num_blocks=10**7),
        "file: num_blocks should be less than or equal to 512, not 10000000",
    ),
    "2^63 parameters": (
        edited(variants=[{"name": "a", "parameters": 2**63}]),
        r"variants\[0\].parameters should be less",
    ),
    "a truth for a number": (
        edited(num_blocks=True),
        "num_blocks should be a valid integer, not True",
    ),
    "nothing for a word": (
        edited(architecture=None),
        "architecture should be a valid string, not None",
    ),
    "a list for a configuration": (edited(config=[]), "config should be an object"),
    "a number without end": (
        edited(intervals=[{"first": 1, "last": 2, "score": 1e999}]),
        "not a finite number",
    ),
    "a rank in other digits": (
        edited(intervals=[{"first": 1, "last": 2, "correction": "٣"}]),
        "correction should match",
    ),
    "a projection in another folder": (
        edited(sites=[{"block": 8, "kind": "text", "fitted": ["../../x"]}]),
        r"sites\[0\].fitted\[0\] should match",
    ),
    "a tuned variant in another folder": (
        edited(variants=[{"name": "../x", "tuned": True}]),
        r"variants\[0\].name should match",
    ),
    "a tuned variant in another folder of Windows": (
        edited(variants=[{"name": "..\\x", "tuned": True}]),
        r"variants\[0\].name should match",
    ),
    "a variant without a name": (
        edited(variants=[{"name": ""}]),
        r"variants\[0\].name should match",
    ),
    "a name of several lines": (
        edited(variants=[{"name": "a\nb"}]),
        r"variants\[0\].name should match",
    ),
    "a name longer than those of files": (
        edited(variants=[{"name": "a" * 256}]),
        r"variants\[0\].name should match",
    ),
    "newer version with a new field": (edited(version=2, heads=[]), "format 2 is not 1; update"),
}


@pytest.mark.parametrize("text, message", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_names_the_part(text, message):
    with pytest.raises(ValueError, match=message):
        plan_from_json(text, "file")


@pytest.mark.parametrize("wrong", [5, 1.5, "x", None, True, [], [5], {}, {"a": 1}])
def test_fields_of_any_type_are_taken_or_refused(wrong):
    """Whatever a file says: what is taken can be laid out, the rest is a line."""
    values = json.loads(PLAN.to_json())
    rows = [(part, name) for part in ("intervals", "sites", "variants") for name in values[part][0]]
    for part, name in [(None, name) for name in values] + rows:
        new = json.loads(PLAN.to_json())
        (new if part is None else new[part][0])[name] = wrong
        with suppress(ValueError):
            plan = plan_from_json(json.dumps(new), "file")
            assert plan.variant(None).name and plan.everything() and plan.text_groups is not None


def test_a_plan_nested_without_end():
    for text in ("[" * 20_000, '{"a": ' * 20_000, "9" * 10_000):
        with pytest.raises(ValueError, match="file: not JSON"):
            plan_from_json(text, "file")


def test_a_missing_field_of_the_plan_is_named():
    values = json.loads(PLAN.to_json())
    del values["fingerprint"]
    with pytest.raises(ValueError, match="file: .*fingerprint"):
        plan_from_json(json.dumps(values), "file")


def test_another_teacher_is_refused():
    PLAN.check_teacher("qwen_image", "f" * 64, "model")
    with pytest.raises(ValueError, match="model is flux, the plan is for qwen_image"):
        PLAN.check_teacher("flux", "f" * 64, "model")
    with pytest.raises(ValueError, match="model .*not the teacher of this plan"):
        PLAN.check_teacher("qwen_image", "0" * 64, "model")


def test_variants_by_name_size_and_intervals():
    assert PLAN.variant("large").intervals == ("5-6",)
    assert PLAN.variant(None).name == "small"
    assert PLAN.variant(FULL).intervals == ()
    assert PLAN.variant("5-6,1-3").intervals == ("5-6", "1-3")
    assert plan_of(intervals=PLAN.intervals).variant(None).intervals == ("1-3", "5-6")
    for unknown in ("huge", "1-3,7-8", "1-3 5-6"):
        with pytest.raises(ValueError, match="is not in the plan; it has: "):
            PLAN.variant(unknown)


def test_with_parts_checks_again():
    assert PLAN.with_parts(variants=()).variants == ()
    with pytest.raises(ValueError, match="'5-6' is not in the plan; it has: 1-3"):
        PLAN.with_parts(intervals=PLAN.intervals[:1])


def test_parse_intervals():
    assert [i.name for i in parse_intervals("3-4 8-10,11-12")] == ["3-4", "8-10", "11-12"]
    assert parse_intervals("") == ()
    with pytest.raises(ValueError, match="'3–4' is not an interval"):
        parse_intervals("3–4")
    published = "3-4 5-7 8-10 11-12 15-24 25-27 29-30 42-43 45-47 48-49 52-53 54-55 56-57"
    assert sum(i.removed for i in parse_intervals(published)) == 25


def test_thousands_of_sites_take_no_time():
    rows = [{"block": index % 500, "kind": "ffn_image"} for index in range(8000)]
    begun = time.perf_counter()
    with pytest.raises(ValueError, match="ffn_image:0 is there twice"):
        plan_from_json(
            edited(
                num_blocks=500, config={"num_layers": 500}, intervals=[], sites=rows, variants=[]
            ),
            "file",
        )
    kinds = ("ffn_image", "ffn_joint", "text")
    rows = [
        {"block": b, "kind": kind, **({"form": "gated"} if kind == "ffn_joint" else {})}
        for b in range(1, 500)
        for kind in kinds
    ]
    plan = plan_from_json(edited(num_blocks=500, intervals=[], sites=rows, variants=[]), "file")
    assert len(plan.everything().sites) == 2 * 499 + 1
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize("text", ["text:1-99999999", "text:٣-٤", "text:1-9999", "text:0-512"])
def test_sites_beyond_any_model(text):
    with pytest.raises(ValueError, match="is not a width site|no model has more than 512"):
        parse_sites(text)
    with pytest.raises(ValueError, match="is not an interval|no model has more than 512"):
        parse_intervals(text.removeprefix("text:"))
