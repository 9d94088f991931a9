"""What runs in a model: seeing every torch function, telling calls apart, and the graph of ops."""
