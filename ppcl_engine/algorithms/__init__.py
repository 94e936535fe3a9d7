"""Mathematics and training: what stages compute, whatever file it comes from."""
