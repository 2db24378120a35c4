"""Move, cut and describe batches: tensors in containers, as loaders yield them.

May import :mod:`force_plugin.errors` only.
"""
