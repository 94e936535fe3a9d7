"""What an exported file of one variant holds: its tensors by their names in the file, each read when it is
written, and what stands beside them."""

from __future__ import annotations

from ..models.layout import layout_of
from ..models.standalone import standalone_contents
from ..models.stock_files import (
    SOURCE_PLAN_KEY,
    Contents,
    refuse_what_stock_lacks,
    stock_contents,
)
from ..models.tensor_sources import Source
from ..models.weights import Weights
from ..plan import PruningPlan, Variant


def contents_of(
    layout: str,
    weights: Weights,
    plan: PruningPlan,
    variant: Variant,
    tensors: dict[str, Source],
) -> Contents:
    """tensors: those of `variant_sources`. Raises ValueError for a variant that the layout cannot hold."""
    if layout == "ppcl":
        return Contents(*standalone_contents(tensors, plan, variant), weights.config)
    refuse_what_stock_lacks(plan, variant, layout)
    indices = [place.index for place in layout_of(plan, variant).places]
    about = {SOURCE_PLAN_KEY: plan.to_json()}
    return stock_contents(layout, weights.architecture, weights.config, indices, tensors, about)
