"""How QuantizationAwareTraining inserts fake-quant: targets, initial weights, hooks, checkpoints and checks."""
