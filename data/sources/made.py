"""Procedural data: a source folder that a function fills on first use."""

import importlib
import os
import secrets
import shutil
from pathlib import Path

from wan_finetune.errors import InputError


def make_folder(folder: Path, make: str) -> None:
    """Call `make`, a `module:function`, with a folder to fill, where `folder` does not exist yet.

    The maker fills a temporary neighbour, which is then renamed: an interrupted maker leaves no half-filled folder,
    and of two processes that start at once one prevails.

    Raises:
        InputError: the function cannot be imported, or makes no folder.
    """
    if folder.exists():
        return
    module_name, _, function_name = make.partition(":")
    try:
        maker = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"data.sources: make = {make!r} cannot be imported: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        maker(partial)
        if not partial.is_dir():
            raise InputError(f"data.sources: make = {make!r} returned without making the folder it was given")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
