"""One command, several worker processes: starts, watches and replaces them."""
