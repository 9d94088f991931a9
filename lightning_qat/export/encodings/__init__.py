"""The plan in the formats of accelerator tool chains."""
