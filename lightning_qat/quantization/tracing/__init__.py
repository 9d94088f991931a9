"""Find out what runs in a model: see every torch function, tell calls apart, and build the graph of ops."""
