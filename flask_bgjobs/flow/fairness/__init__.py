"""Fairness: turns by a key, and the weights of keys."""
