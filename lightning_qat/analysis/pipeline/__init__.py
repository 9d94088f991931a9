"""Whether quantization is to blame: convergence, the ladder of checks, fingerprints of pipelines."""
