"""Select the weights with the k largest scores, and count k for each step.

May import ``parallel`` and the rooms below it.
"""
