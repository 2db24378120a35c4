"""Saliencies: the base class, the methods and their names.

A method measures and scores. It does not import the probe, but only the protocol of
the measurements that it needs (:class:`Measurements`).

May import ``selection`` and the rooms below it, but not ``scoring``.
"""

from force_plugin.methods.base import SaliencyMethod, elementwise
from force_plugin.methods.measurements import Measurements
from force_plugin.methods.registry import METHODS

__all__ = ["METHODS", "Measurements", "SaliencyMethod", "elementwise"]
