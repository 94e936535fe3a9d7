"""What a stage will take, before it starts: `--dry-run`, and refusing a job that cannot fit."""
