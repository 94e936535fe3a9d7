"""What several benchmarks share: output, scoring, teachers."""
