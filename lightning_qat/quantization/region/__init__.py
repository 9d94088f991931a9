"""The quantized region of a model: inserting, running, calibrating, freezing and removing it."""
