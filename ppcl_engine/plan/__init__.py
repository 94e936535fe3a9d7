"""What is pruned: a plan, the parts it is made of, and reading one."""

from .parts import ALL, FORMS, FULL, SITE_KINDS, Interval, TextGroup, Variant, WidthSite
from .pruning_plan import PruningPlan
from .reading import parse_intervals, parse_sites, plan_from_json, plan_from_value

__all__ = [
    "ALL",
    "FORMS",
    "FULL",
    "SITE_KINDS",
    "Interval",
    "PruningPlan",
    "TextGroup",
    "Variant",
    "WidthSite",
    "parse_intervals",
    "parse_sites",
    "plan_from_json",
    "plan_from_value",
]
