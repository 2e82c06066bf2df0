"""Measurements: what the kernels need, and what they reach on a machine."""
