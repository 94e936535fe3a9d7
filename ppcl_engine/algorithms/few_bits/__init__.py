"""Bits per matrix by measured error, and weights that make up for rounding."""
