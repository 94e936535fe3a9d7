"""`python -m benchmarks.distill_speed`."""
