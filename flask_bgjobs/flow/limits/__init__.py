"""Limits, rates and fairness: how many jobs may run at once, and how many may start per time."""
