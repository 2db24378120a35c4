"""Common uses of a model, a function for each use."""
