"""The worker: claims jobs, runs them in its pools, and keeps them alive."""
