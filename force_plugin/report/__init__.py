"""Report the weights that each layer has left, as a table and a plot.

May import ``masks``, ``methods`` and ``scoring``, and the rooms below them.
"""
