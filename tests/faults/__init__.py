"""The fault campaign: hundreds of faults put into real processes, files and servers, and what must hold afterwards, checked.

`make faults`, or `python -m tests.faults --help`.
"""
