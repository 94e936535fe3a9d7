"""ppcl_engine: prune MMDiT diffusion transformers, and switch pruned parts back on at will (PPCL)."""

from __future__ import annotations

TYPE_CHECKING = False  # typing is not imported: Ctrl-C while it is read would end in its traceback

__version__ = "0.1.0"
__all__ = ["PruningPlan", "__version__", "open_model"]

if TYPE_CHECKING:
    from .models.opening import open_model
    from .plan import PruningPlan


def __getattr__(name: str):
    """Imports the two names on first use, so that importing the package does not import torch."""
    if name == "open_model":
        from .models.opening import open_model

        return open_model
    if name == "PruningPlan":
        from .plan import PruningPlan

        return PruningPlan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
