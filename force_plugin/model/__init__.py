"""The parts of a PyTorch model that pruning needs.

These are the weights and their names, masks on weights, and functions that restore a
model's attributes.

This folder imports nothing of this package but the errors.
"""
