"""Jobs: stages in a process of their own, in a run folder that anyone can watch, cancel and go on
with."""
