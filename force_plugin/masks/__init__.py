"""Masks on a model: applied, read, saved, loaded, made permanent, checked.

Imports :mod:`force_plugin.methods`, and what that may import.
"""
