"""The whole method as one job, from what somebody in a hurry can say: a model, a size, a quality.

How much goes by depth and how much by width follows the paper, batches and precision the size of the
model and this machine. Everything else is a preset of the stages (`settings.presets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..algorithms.detection.intervals import PUBLISHED_SHARE
from ..data.codecs.table import has_tables
from ..estimate.counts import TEXT_TOKENS
from ..estimate.needs import needs
from ..estimate.picture_grids import GRID
from ..models.cost import STORED_BYTES, CostModel
from ..models.opening import model_config
from ..settings.base_settings import from_mapping
from ..settings.presets import Quality, preset
from ..settings.prune_settings import CalibrateConfig
from ..settings.toml_files import toml_text
from ..stages import STAGES
from ..system.machine import device_memory, resolve_device

RECIPE_FILE = "recipe.toml"
SMALLEST, LARGEST_SHARE = 0.3, 0.95  # of the parameters: what a target may be
PUBLISHED_PARAMETERS = 10.6 / 20.43  # that the paper leaves of Qwen-Image
DEPTH_FIRST = PUBLISHED_SHARE / (1 - PUBLISHED_PARAMETERS)
"""share of the blocks that go by depth, for each share of the parameters that goes in all"""
# detect-width refuses a plan whose intervals alone meet its share
LEFT_TO_WIDTH = 0.05
LARGE = 1_000_000_000  # parameters; smaller ones are taken for the bundled teachers' kind
PIXELS = 1024  # height and width of a large model's pictures
RATES = {"distill-depth": 3e-3, "distill-width": 1e-3, "polish": 1e-3}
"""learning rates of the bundled teachers; those of the settings are the authors' for 20 B parameters"""
BATCHES, MOST_BATCH = 4, 16  # batches at least: one is held out; each has enough for four pictures
ROOM = 0.9  # share of a device's memory that a job may plan with
ORDER = (
    "calibrate",
    "probe",
    "detect",
    "distill-depth",
    "detect-width",
    "distill-width",
    "polish",
    "variants",
    "export",
    "evaluate",
)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of a model."""

    model: Path
    """the full model"""
    share: float
    """parameters of the smallest variant, relative to the full model's"""
    quality: Quality
    source: dict[str, str]
    """where calibration's captions come from: {"prompts": file} or {"embeddings": file}"""
    name: str = "pruned"
    """of the bundle, without ending"""
    size: int = 0
    """height and width of the pictures, in pixels; 0: as is usual for the model"""
    device: str = "auto"
    seed: int = 0


def recipe(wish: Wish, folder: Path) -> list[tuple[str, dict]]:
    """(stage, settings) of the whole job. folder: where it will run; it need not exist.

    Raises ValueError for a file that is not a model, and for a share that is out of reach.
    """
    cost = _cost_of(wish.model)
    check_share(wish.share, cost)
    stages = _stages(wish, cost)
    ways = [
        [(stage, {**settings, **way}) for stage, settings in stages]
        for way in _ways_to_fit(resolve_device(wish.device))
    ]
    return next((way for way in ways if _fits(way, folder)), ways[-1])


def share_of(model: Path, gigabytes: float) -> float:
    """The share of the parameters that weights of this size in bfloat16 are."""
    cost = _cost_of(model)
    share = gigabytes * 1e9 / (_parameters(cost) * STORED_BYTES)
    check_share(share, cost)
    return share


def check_share(share: float, cost: CostModel) -> None:
    """Raises ValueError for a share that the method cannot reach, or that leaves nothing to do."""
    if not SMALLEST <= share <= LARGEST_SHARE:
        size = _parameters(cost) * STORED_BYTES / 1e9
        raise ValueError(
            f"target is {share:.0%} of the full model's {size:.3g} GB; choose {SMALLEST:.0%} to {LARGEST_SHARE:.0%} of it, "
            f"which is {SMALLEST * size:.3g} to {LARGEST_SHARE * size:.3g} GB"
        )


def blocks_to_remove(share: float, cost: CostModel) -> int:
    """As many as the paper removes for what goes in all, and never so many that, whichever blocks they
    are, nothing is left for width."""
    blocks = sorted((block.parameters for block in cost.blocks()), reverse=True)
    published = round(len(blocks) * DEPTH_FIRST * (1 - share))
    most = (1 - LEFT_TO_WIDTH) * (1 - share) * _parameters(cost)
    safe = sum(sum(blocks[: n + 1]) <= most for n in range(len(blocks)))
    return max(1, min(published, safe))


def brings_text_encoder(model: Path) -> bool:
    """Whether the engine can draw words with this model alone."""
    if model.is_dir():
        return (model / "model_index.json").exists()
    return has_tables(model)


def recipe_text(stages: list[tuple[str, dict]], folder: Path) -> str:
    """The same job as a file for `ppcl run`, with the folder's own path in it."""
    shared = set.intersection(*(set(settings.items()) for _, settings in stages))
    tables = {"common": {"run": str(folder), **dict(sorted(shared))}}
    for stage, settings in stages:
        own = {name: value for name, value in settings.items() if (name, value) not in shared}
        own |= {n: str(folder / own[n]) for n in ("prompts", "embeddings") if n in own}
        tables[stage] = own
    return toml_text(tables)


def _cost_of(model: Path) -> CostModel:
    _, architecture, config = model_config(model)
    return CostModel(architecture, config, GRID, TEXT_TOKENS)


def _parameters(cost: CostModel) -> int:
    return cost.outer_parameters + sum(block.parameters for block in cost.blocks())


def _stages(wish: Wish, cost: CostModel) -> list[tuple[str, dict]]:
    """Before precision and streaming are chosen."""
    large = _parameters(cost) > LARGE
    common = {"model": str(wish.model), "device": wish.device, "seed": wish.seed}
    own = _own_settings(wish, cost, large)
    # without a text encoder nothing can be drawn to compare
    order = [stage for stage in ORDER if stage != "evaluate" or "prompts" in wish.source]
    return [
        (stage, {**common, **_preset(stage, wish.quality), **own.get(stage, {})}) for stage in order
    ]


def _preset(stage: str, quality: str) -> dict:
    return {} if stage == "export" else preset(stage, quality)


def _own_settings(wish: Wish, cost: CostModel, large: bool) -> dict[str, dict]:
    """Stage -> the settings that this model and this wish decide."""
    side = wish.size or (PIXELS if large else 0)
    guidance = {"guidance": 3.5 if large else 2.0}
    size = {"height": side, "width": side}
    samples = preset("calibrate", wish.quality)["samples"]
    batch = 1 if large else min(MOST_BATCH, samples // BATCHES)
    # a model that reads the guidance is never sampled without a caption
    empty = {"empty_captions": 0.0} if cost.config.get("guidance_embeds") else {}
    rates = {} if large else {stage: {"learning_rate": rate} for stage, rate in RATES.items()}
    return {
        "calibrate": {**wish.source, **guidance, **size, **empty, "batch": batch},
        "detect": {"remove": blocks_to_remove(wish.share, cost)},
        "detect-width": {
            "share": wish.share,
            # one form is fitted and measured in half the time
            "form": "paper" if wish.quality == "quick" else "best",
        },
        "distill-depth": rates.get("distill-depth", {}),
        "distill-width": rates.get("distill-width", {}),
        "polish": {"checkpointing": large, **rates.get("polish", {})},
        "export": {"name": wish.name},
        "evaluate": {**wish.source, **guidance, **size, "batch": 2 if large else 50},
    }


def _ways_to_fit(device: str) -> list[dict]:
    """Precision and streaming, the fastest first."""
    usual = "float32" if device == "cpu" else "bfloat16"
    return [
        {"dtype": usual, "streamed": False},
        {"dtype": usual, "streamed": True},
        {"dtype": "bfloat16", "streamed": True},
    ]


def _fits(stages: list[tuple[str, dict]], folder: Path) -> bool:
    configs = [
        from_mapping(STAGES[stage][0], {**settings, "run": str(folder)}, f"stage {stage}")
        for stage, settings in stages
    ]
    there = ROOM * device_memory(resolve_device(configs[0].device))
    calibrate = next(c for c in configs if isinstance(c, CalibrateConfig))
    return all(needs(config, calibrate).memory <= there for config in configs)
