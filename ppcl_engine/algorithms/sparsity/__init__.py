"""Weights set to zero with no training: scores, who is compared with whom, patterns, files (the
stage: `ppcl sparsify`)."""
