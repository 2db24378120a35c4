"""Select the weights with the k largest scores, and count k for each step.

May import :mod:`force_plugin.parallel` and :mod:`force_plugin.errors`.
"""
