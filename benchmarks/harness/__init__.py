"""What the benchmarks share: contenders, peers, shapes, timing and results."""
