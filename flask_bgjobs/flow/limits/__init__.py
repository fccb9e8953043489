"""Limits and rates: how many jobs may run at once, and how many may start per time."""
