"""What can be told from graph, plan and scales without a metric: flaws, and what to do about them."""
