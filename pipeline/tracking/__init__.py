"""Tracking: the run directory is the truth, MLflow its mirror.

Everything is written to the run directory first (`metrics.jsonl`, `artifacts/`, `tracked.jsonl`). A `Mirror` brings a store
level with it: live from a thread of rank 0 (`Tracker`), or later by `python -m pipeline sync RUN_DIR`. Both do the same, so
a slow, failing or absent server holds up no step and loses nothing (`bench tracking` measures it). mlflow is imported in `mlflow_store.py` alone.
"""

from pipeline.tracking.facts import Dataset, RunFacts, datasets_of
from pipeline.tracking.tracker import Tracker, open_tracker

__all__ = ["Dataset", "RunFacts", "Tracker", "datasets_of", "open_tracker"]
