"""The parts of a PyTorch model that pruning needs.

These are the weights and their names, masks on weights, and functions that restore a
model's attributes.

May import the modules ``files`` and ``errors``, but not ``data``.
"""
