"""Probes: how much a frozen network's features know of labels it never saw, with honest intervals, beside what costs nothing.

`sites` makes views without chance, `features` runs describers over them (a network; `pixels`: statistics of the same pixels), `classify`
fits k-NN and linear heads, `scores` draws the intervals, `split` decides who is training and who is test, by place, `exam` is one round of
it. `in_loop` is what training calls; `offline`, `few` and `labelled` what `pipeline probe` does with a finished model, on any `source`.
"""
