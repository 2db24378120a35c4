"""Masks on a model: applied, read, saved, loaded, made permanent, checked.

This folder imports :mod:`force_plugin.methods`, and the folders that ``methods`` may
import.
"""
