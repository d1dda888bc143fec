"""Exit codes with a meaning between the trainer and whoever started it (the batch script, a supervisor)."""

from __future__ import annotations

DONE = 0
"""The run reached its last step."""

FAILED = 1
"""The run failed; the same start may succeed again (a lost node, a full disk), or not (cluster.slurm.requeue decides)."""

USAGE = 2
"""Bad arguments or configuration: starting again cannot help."""

FENCED = 86
"""A later start of the run has taken its directory over. Final for this one: starting again would throw the other out."""

REQUEUE = 85
"""Asked to stop by a signal (preemption, time limit), a checkpoint of the last finished step is committed: requeue me.
Not 0, because SLURM takes a batch script that exits 0 after a preemption signal for completed."""
