"""The operations that people run by hand, shared by the command line, the API and the pages."""
