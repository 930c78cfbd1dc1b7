"""Searches: of training fields at each point, and of a study's shares."""
