"""Scaling experiments: sweeps of runs, what they found, and the laws fitted to it."""
