"""Settings every test shares: one thread per process (two cores, many processes), no deadlines for property tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

from hypothesis import HealthCheck, settings

from tests.s3_server import s3_server, s3_url

__all__ = ["s3_server", "s3_url"]

# derandomized: a property that fails in CI fails on a laptop with the same example; always the same ones, so few are enough
settings.register_profile(
    "geoloom", deadline=None, max_examples=50, derandomize=True, suppress_health_check=list(HealthCheck)
)
# `make properties`: other examples each time, and more of them
settings.register_profile(
    "random", deadline=None, max_examples=400, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile(os.environ.get("GEOLOOM_PROPERTIES", "geoloom"))
