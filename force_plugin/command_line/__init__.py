"""Options of ``force-prune``, and the files that it writes.

Imports :mod:`force_plugin.pruning`, and what that may import.
"""
