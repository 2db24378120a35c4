"""The methods by what they need: a new one is tested with its kind."""

from force_plugin import METHODS

WITH_PASSES = [name for name, method in METHODS.items() if method.looks]
"""Those that pass something through the network."""

WITH_LOSS = [name for name in WITH_PASSES if name != "synflow"]
"""Those that take a loss."""

ITERATIVE = [name for name in WITH_LOSS if METHODS[name].steps != 1]
"""Those that take a loss at each of several steps."""
