"""Fits with a status, intervals and the rows that they rest on. NumPy and SciPy only; a fit knows no file."""
