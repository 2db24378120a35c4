"""Hook into the training loops of Lightning and of training scripts.

May import :mod:`force_plugin.pruning`, and everything that pruning may import.
"""
