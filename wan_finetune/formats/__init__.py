"""Adapter files: one module a format, each with `write(path, adapter)` and `read(path)`."""
