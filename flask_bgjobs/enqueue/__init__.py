"""From a call in the app to a row in the database."""
