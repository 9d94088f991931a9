"""The fake-quants: modules that quantize a tensor and give it back as float."""
