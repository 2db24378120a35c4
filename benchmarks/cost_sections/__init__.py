"""The sections of ``cost.py``, a file each: ``measure``, and ``show`` if needed."""
