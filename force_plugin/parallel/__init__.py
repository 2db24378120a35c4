"""Distributed jobs: equal results on every rank, and models in shards.

This folder imports :mod:`force_plugin.model` and the errors.
"""
