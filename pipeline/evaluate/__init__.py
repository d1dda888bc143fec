"""Evaluation on published labelled data sets: one table of rows (`registry`), two modes, baselines always beside the score.

```
registry.ROWS ─ reader ─▶ LabelledSet (items, classes, split digest) ─ check_set ─▶ radiometry refused or named
       │                                       │
       └ Bands(sensor, order, unit, offset)    └ encode: network · untrained twin · pixel statistics ─▶ FeatureStore (cached)
                                                              │
                             head: k-NN, logistic · dense · pair · boxes ─▶ Records per test item ─▶ Score, paired differences ─▶ results.jsonl
```
"""
