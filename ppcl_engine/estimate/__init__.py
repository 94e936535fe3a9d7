"""How much memory, disk and time a stage will take: for `--dry-run`, and to refuse jobs that cannot fit."""
