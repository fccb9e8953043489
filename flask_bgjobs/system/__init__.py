"""The operating system: processes, signals, threads, memory and logging that never raises."""
