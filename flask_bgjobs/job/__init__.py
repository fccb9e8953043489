"""What a job is: statuses, records, retries and masking, without Flask and without a database."""
