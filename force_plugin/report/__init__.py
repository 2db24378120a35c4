"""What is left of each layer, in words and pictures.

Imports :mod:`force_plugin.model`, files and errors.
"""
