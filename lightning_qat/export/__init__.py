"""Files for converters and accelerator tool chains."""
