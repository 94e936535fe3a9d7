"""Time and memory on one GPU, at full size, in a table that can be pasted."""
