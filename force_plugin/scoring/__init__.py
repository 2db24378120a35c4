"""Measurements of a partly pruned network that leave no trace in the network.

This folder imports :mod:`force_plugin.selection`, and the folders that ``selection``
may import, but no method.
"""

from force_plugin.scoring.probe import Probe

__all__ = ["Probe"]
