"""Report the weights that each layer has left, as a table and a plot.

May import :mod:`force_plugin.model`, :mod:`force_plugin.files` and
:mod:`force_plugin.errors`.
"""
