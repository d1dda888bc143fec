"""Downstream use of an exported backbone, to copy from."""
