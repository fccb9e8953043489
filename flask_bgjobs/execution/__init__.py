"""Running the code of one attempt."""
