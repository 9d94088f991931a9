"""The float model against the quantized one, op by op: what kind of error, and the remedy."""
