"""Adapter files: one module a format, each with `write(path, adapter)` and `read(path)`; `reading.FORMATS` has all."""

FORMAT_NAMES = ("diffusers", "comfyui", "kohya", "peft", "original")
"""Known before anything heavy is imported, for `--help`; `reading.FORMATS` has the same names."""
