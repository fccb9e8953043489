"""Flow control: what decides when a job may run, beyond its priority and its delay."""
