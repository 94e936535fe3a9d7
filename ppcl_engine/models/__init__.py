"""From files to a pruned model and back."""
