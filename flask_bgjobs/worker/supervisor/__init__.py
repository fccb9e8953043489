"""Several worker processes with one command: starts, watches and replaces them."""
