"""Hook into the training loops of Lightning and of training scripts.

May import ``sparse`` and the rooms below it.
"""
