"""What people do by hand, for the command line, the API and the pages alike."""
