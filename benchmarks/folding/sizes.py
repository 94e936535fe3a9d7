"""Parameters and bytes of the released Qwen-Image models, folded and not, counted on the meta
device."""

from __future__ import annotations

from collections import Counter

import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.architectures.folded import Folding
from ppcl_engine.models.layout import Place
from ppcl_engine.models.released import released_layout
from ppcl_engine.models.surgery import empty_block
from ppcl_engine.models.weights import parameter_count

QWEN = architecture_named("qwen_image")
REAL = QWEN.model_configs["qwen_image"]
TEN_BILLION = {  # as released, by the numbers after removal (method: distil width)
    "single_stream_index": [19, 23, *range(29, 35)],
    "ehs_proj_index": [19, 23, 34],
    "ffn_proj_index": [2, 33, 34],
}
MODELS = {
    "Qwen-Image, 60 blocks": (60, {}),
    "35 blocks (12B)": (35, {}),
    "35 blocks, width (10B)": (35, TEN_BILLION),
}
FOLDINGS = {
    "off": None,
    **{f"table_{steps}": Folding(form="table", inputs=steps) for steps in (8, 20, 50)},
    **{f"basis_{rank}": Folding(form="basis", inputs=1 + rank) for rank in (16, 32, 64)},
}


def model_sizes() -> dict:
    """model -> folding -> {"parameters", "bytes", "maps"}; a basis' maps are float32, all else
    bf16. maps: bytes of what stands for the modulations, a table's for one number of rows."""
    return {
        name: {key: _size(count, lists, folding) for key, folding in FOLDINGS.items()}
        for name, (count, lists) in MODELS.items()
    }


def _size(count: int, lists: dict, folding: Folding | None) -> dict:
    """A text-pruned block's unused attn.to_add_out is counted in the published 10.60 B, so here
    too."""
    config = QWEN.with_blocks(REAL, range(count)) | (
        {"folding": folding.to_config()} if folding else {}
    )
    places = released_layout(QWEN, {**config, **lists}, "the release").places
    kinds, one_of = Counter(map(_kind, places)), {_kind(place): place for place in places}
    with torch.device("meta"):
        outer = QWEN.build_outer(config)
        blocks = {kind: empty_block(QWEN, config, place, {}) for kind, place in one_of.items()}
    width = QWEN.width(REAL)
    unused = sum(place.text_source is not None for place in places) * width * (width + 1)
    inside = sum(count * parameter_count(blocks[kind]) for kind, count in kinds.items())
    parameters = parameter_count(outer) + inside + unused
    maps = sum(count * _maps(blocks[kind]) for kind, count in kinds.items())
    exact = maps if folding and folding.form == "basis" else 0
    return {"parameters": parameters, "bytes": 2 * (parameters + exact), "maps": 2 * (maps + exact)}


def _kind(place: Place) -> tuple:
    """Blocks of one kind have as many parameters."""
    return (
        place.text_source is None,
        place.steps_text,
        place.publishes,
        *(site.kind for site in place.ffn),
    )


def _maps(block) -> int:
    names = tuple(f"{name}.weight" for name in QWEN.timestep_modulations)
    return sum(p.numel() for name, p in block.named_parameters() if name.endswith(names))
