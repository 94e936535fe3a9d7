"""Which blocks and projections can go: alignment, intervals, damage, width fits."""
