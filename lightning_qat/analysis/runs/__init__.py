"""Results over several runs: the accuracy table, and two runs side by side."""
