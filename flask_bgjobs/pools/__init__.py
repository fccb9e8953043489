"""Where jobs run: each pool offers the same few methods to the worker."""
