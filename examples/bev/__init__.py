"""A bird's-eye-view model with two tasks, tuned for int8 and int16; see README.md."""
