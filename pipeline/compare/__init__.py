"""Comparison of runs: is it fair, what differs, who is better. `load` finds runs, `verdict` judges, `figures` condenses,
`paired` compares site by site, `terminal` and `report` show."""
