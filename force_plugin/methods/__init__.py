"""What a saliency is: the base class, the methods, their names.

A method measures and scores. It knows no probe, but a protocol of what it asks for
(:class:`Measurements`).

Imports :mod:`force_plugin.selection`, and what that may import.
"""

from force_plugin.methods.base import SaliencyMethod, elementwise
from force_plugin.methods.measurements import Measurements
from force_plugin.methods.registry import METHODS

__all__ = ["METHODS", "Measurements", "SaliencyMethod", "elementwise"]
