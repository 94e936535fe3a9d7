"""Modulations folded away: into tables of values, or into a basis."""
