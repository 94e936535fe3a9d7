"""`python -m benchmarks.sparsity`"""
