"""Matrices of experiments: what to run, what it takes, running it."""
