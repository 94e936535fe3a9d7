"""Everything that can be set, stage by stage. Standard library only."""
