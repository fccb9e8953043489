"""Helpers for the operating system: processes, signals, threads, memory, and safe logging."""
