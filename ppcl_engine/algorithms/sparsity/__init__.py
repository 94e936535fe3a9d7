"""Setting weights to zero without training: scores, groups that are ranked together, patterns,
files (the stage is `ppcl sparsify`)."""
