"""Pretraining losses as pure functions; `model.pretrain` puts them together.

The convention that makes them exact for any number of ranks and micro-batches is written in `model.losses.reduce`.
"""
