"""The rungs of the pipeline check: copies of the module that train in one changed way each."""
