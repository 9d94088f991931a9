"""Which point hurts the output, and how much."""
