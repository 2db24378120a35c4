"""Masks on a model: applied, read, saved, loaded, made permanent, checked.

May import ``report``, ``methods`` and ``scoring``, and the rooms below them. Files of
masks also have the package's version.
"""
