"""Batches as loaders give them: containers of tensors, moved, cut and described.

Imports :mod:`force_plugin.errors` alone.
"""
