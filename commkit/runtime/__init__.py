"""What keeps ranks together while they train: they agree on a configuration before anything is sent, do it in
the same order on a thread of its own, and hear at once of a rank that failed."""
