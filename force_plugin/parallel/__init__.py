"""Several processes: the same answer on every rank, and models in shards.

Imports :mod:`force_plugin.model` and errors.
"""
