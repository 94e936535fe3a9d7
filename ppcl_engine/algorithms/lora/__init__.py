"""LoRAs carried over to a pruned model: low-rank mathematics, pairs in training, the walk of two teachers."""
