"""Settings that make a file sparse."""

# where any will do: fast
PLAIN = {"score": "wanda", "granularity": "layer", "exchange": False, "compensate": False}
