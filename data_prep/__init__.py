"""Imagery to shards: sources, harmonisation, shard format, build, checks. Imports no torch."""
