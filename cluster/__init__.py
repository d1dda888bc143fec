"""Where it runs: storage, ranks and addresses, run directories, SLURM, the planner. Imports nothing of ours and no torch."""
