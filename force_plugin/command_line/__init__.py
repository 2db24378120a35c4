"""The options of ``force-prune``, and the files that ``force-prune`` writes.

May import :mod:`force_plugin.pruning`, and everything that pruning may import.
"""
