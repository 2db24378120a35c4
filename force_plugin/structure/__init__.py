"""Remove channels: find channels that go together, choose, build the smaller model.

May import :mod:`force_plugin.pruning`, and everything that pruning may import.
"""
