"""Where a run is tracked: a setting, or the environment, which is the only place for a URI with a password."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cluster.errors import UsageError
from cluster.secrets import MASK

VARIABLES = ("GEOLOOM_TRACKING_URI", "MLFLOW_TRACKING_URI")


def tracking_uri(configured: str, env: Mapping[str, str] | None = None) -> str:
    """The store of a run whose `tracking.uri` is `configured`: itself, or for "env" (or where a password was taken out of it, as in
    every file of a run) the first of VARIABLES that is set.

    Raises:
        UsageError: none is set.
    """
    if configured != "env" and MASK not in configured:
        return configured
    env = os.environ if env is None else env
    for name in VARIABLES:
        if env.get(name):
            return env[name]
    what = "takes it from the environment" if configured == "env" else f"was kept without its password ({configured})"
    raise UsageError(f"tracking.uri {what}: set {' or '.join(VARIABLES)}, or tracking.uri=none")
