"""Benchmarks of the prep stage: codecs on real pixels, build throughput by stage."""
