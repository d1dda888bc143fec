"""Benchmarks of `python -m pipeline bench`. Modules import nothing heavy at the top."""
