"""Recurring jobs: when they run, and which workers enqueue them."""
