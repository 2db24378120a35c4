"""Hook into the training loops of Lightning and of training scripts.

May import ``structure`` and the rooms below it.
"""
