"""The report of a run: a page, JSON, drawings."""
