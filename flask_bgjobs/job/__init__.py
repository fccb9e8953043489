"""Job logic without Flask and without a database: statuses, records, retries, JSON and masking."""
