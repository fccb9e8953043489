"""Enqueueing: from a call in the app to a row in the database."""
