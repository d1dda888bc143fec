"""Batches in memory for tests; they are the benchmarks'."""

from pipeline.bench.simulated import STATISTICS, affine, batch_of, make_batch, make_view, split

__all__ = ["STATISTICS", "affine", "batch_of", "make_batch", "make_view", "split"]
