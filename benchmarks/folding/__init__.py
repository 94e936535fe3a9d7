"""`python -m benchmarks.folding`"""
