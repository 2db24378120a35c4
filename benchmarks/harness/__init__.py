"""Tools that the benchmarks share: measuring, training, storing and printing."""
