"""`python -m cluster COMMAND …`: submit to SLURM, look at jobs and runs, plan a layout before queuing."""

from __future__ import annotations

from cluster.cli import dispatch

COMMANDS = {
    "submit": ("cluster.commands.submit", "send a training run or a shard build to SLURM"),
    "status": ("cluster.commands.status", "queue state, last step, last checkpoint, log of the failing rank"),
    "plan": ("cluster.commands.plan", "memory per GPU, step time, communication, GPU-hours, recommended layout"),
    "requeue": ("cluster.commands.requeue", "what the batch script calls when its ranks have ended"),
}

if __name__ == "__main__":
    dispatch("cluster", __doc__ or "", COMMANDS)
