"""What of a LoRA a pruned model has as the file is, adapted, and trained on it directly."""
