"""The worker: claims jobs, runs them in its pools, and records their outcomes."""
