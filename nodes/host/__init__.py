"""Pruned blocks on ComfyUI's own modules."""
