"""Looks inside trained models: what each block already predicts, and which blocks of two models hold the same."""
