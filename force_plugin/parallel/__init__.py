"""Distributed jobs: equal results on every rank, and models in shards.

May import ``model`` and ``data``, and the modules below them.
"""
