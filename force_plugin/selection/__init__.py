"""Which weights stay: the k largest of all scores, and how many after each step.

Imports :mod:`force_plugin.parallel` and errors.
"""
