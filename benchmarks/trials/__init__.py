"""Real trainings, one after another, for ``convergence.py``: which systems on which tasks, how they are run,
what the table says of them."""
