"""Pruning: the loop that scores, selects and masks, step by step.

This room also has the first step alone (:func:`force_plugin.saliency`), the diagnosis,
and the reasons to doubt a mask.

May import ``masks`` and ``report``, and the rooms below them.
"""
