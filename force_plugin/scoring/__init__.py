"""Measurements of a partly pruned network that leave no trace in the network.

May import ``selection`` and the rooms below it, but not ``methods``.
"""

from force_plugin.scoring.probe import Probe

__all__ = ["Probe"]
