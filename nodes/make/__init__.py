"""The nodes of the menu PPCL/make: each prepares a run and follows its job."""
