"""Pruning: the loop that scores, selects and masks, step by step.

This folder also has the first step alone (:func:`force_plugin.saliency`), the
diagnosis, and the reasons to doubt a mask.

It imports ``masks``, ``report``, ``scoring``, and the folders that they may import.
"""
