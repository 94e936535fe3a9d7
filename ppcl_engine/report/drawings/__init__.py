"""Numbers to the bytes of a PNG."""
