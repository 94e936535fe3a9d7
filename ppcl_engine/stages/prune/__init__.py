"""The paper, stage by stage: a file a stage, named by its verb."""
