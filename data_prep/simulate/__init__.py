"""Simulated sites with known truth: one land-cover map seen by three sensors (`hr`, `s2`, `s1`), labelled, on one footprint."""
