"""The options of ``force-prune``, and the files that ``force-prune`` writes.

May import the doors ``hold``, ``lightning`` and ``zoo``, and the rooms below them.
"""
