"""Move, cut and describe batches: tensors in containers, as loaders yield them.

May import the modules ``files`` and ``errors``, but not ``model``.
"""
