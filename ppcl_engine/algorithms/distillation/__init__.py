"""Training of what stands in for what goes: losses, trainer, rounds, tuning, quantization."""
