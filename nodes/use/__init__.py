"""The nodes of the menu PPCL: load, switch, look at, compare."""
