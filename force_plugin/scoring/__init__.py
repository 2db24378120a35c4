"""Measure a network, as it is pruned so far, and leave no trace in it.

Imports :mod:`force_plugin.selection` and what that may import, but no method.
"""

from force_plugin.scoring.probe import Probe

__all__ = ["Probe"]
