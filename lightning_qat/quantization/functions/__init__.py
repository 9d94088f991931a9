"""The table of torch functions: how each one is treated, and why."""
