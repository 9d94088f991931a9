"""Which kind of error a point makes, and the remedy for it."""
