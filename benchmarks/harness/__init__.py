"""What the benchmarks share: a script says what it asks, and how is in here."""
