"""Channels taken out: what goes together, what can go, and the smaller model.

Imports :mod:`force_plugin.pruning`, and what that may import.
"""
