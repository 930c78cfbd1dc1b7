"""Engines run the jobs of a study, each in a process of its own, by Ray or on this machine alone. They know no plan."""
