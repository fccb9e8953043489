"""What is different in each database."""
