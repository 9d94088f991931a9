"""The ladder of checks that tells a misaligned pipeline from hyperparameters and from quantization error."""
