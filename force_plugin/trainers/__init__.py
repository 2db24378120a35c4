"""What other people's trainers do, looked at from inside.

Imports :mod:`force_plugin.pruning`, and what that may import.
"""
