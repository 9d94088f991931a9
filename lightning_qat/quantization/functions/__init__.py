"""The table of torch functions: how each one is treated, and why. ``function_table.py`` says where to change it."""
