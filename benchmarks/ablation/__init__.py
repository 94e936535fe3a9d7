"""`python -m benchmarks.ablation`"""
