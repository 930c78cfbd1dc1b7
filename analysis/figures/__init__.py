"""Figures in two steps: a table of exactly what is drawn, and the drawing, which reads that table and nothing else."""
