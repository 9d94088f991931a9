"""Statistics of what is quantized, point by point."""
