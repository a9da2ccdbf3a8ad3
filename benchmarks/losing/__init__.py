"""What goes wrong with workers, for ``faults.py``: kills and stops, F1 to F20, a soak."""
