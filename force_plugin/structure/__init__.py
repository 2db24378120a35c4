"""Remove channels: find channels that go together, choose, build the smaller model.

May import ``pruning`` and the rooms below it.
"""
