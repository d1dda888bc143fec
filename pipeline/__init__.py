"""The run: reader, engine, checkpoints, tracking, probes, comparison."""
