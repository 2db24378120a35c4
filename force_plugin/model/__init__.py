"""A model as PyTorch has it.

Its weights and their names, how a mask sits on one, and the way back to what its
attributes were.

Imports nothing of this package but errors.
"""
