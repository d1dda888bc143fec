"""SLURM: render a batch script, submit it, decide after each start whether it goes back into the queue, show its state."""
