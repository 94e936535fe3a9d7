"""One model file into another."""
