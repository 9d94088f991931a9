"""Reading what this package has written: files and checkpoints, which may be damaged or made by somebody else."""
