"""From a float checkpoint and a target to the configuration that meets it, by stages that are Trainer runs."""
