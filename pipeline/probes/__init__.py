"""Probes: how much a frozen network's features know of labels it never saw, with honest intervals.

`sites` makes views without chance, `features` runs the network over them, `classify` fits k-NN and linear heads, `scores` draws
the intervals, `split` decides who is training and who is test, by place. `in_loop` is what training calls.
"""
