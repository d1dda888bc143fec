"""Parallelism applied from outside: layout, process groups, expert parallelism, and the one door to DeepSpeed's internals."""
