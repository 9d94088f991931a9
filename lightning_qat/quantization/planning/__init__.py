"""What is quantized how, and why: configuration, fusion and hardware profiles make the plan."""
