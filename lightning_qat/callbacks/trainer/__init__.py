"""What the callbacks need from Lightning, its Trainer and its loggers."""
