"""The loop: score, select, mask, and again.

Also its first step alone, a diagnosis, and what makes a mask doubtful.

Imports masks, report, scoring, and what those may import.
"""
