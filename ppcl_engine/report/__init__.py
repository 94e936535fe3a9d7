"""What a run found: a page, JSON, drawings."""
