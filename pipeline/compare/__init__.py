"""Comparison of runs: is it fair, what differs, who is better. `load` finds runs, `verdict` judges, `figures` condenses,
`terminal` and `report` show."""
