"""`EndpointHandler`: what Hugging Face's Inference Endpoints call, and what the local server calls.

In an adapter's repository this file lies beside the adapter's two files, `settings.json` and the library,
`wan_finetune/`. The service puts that folder first on the import path, makes `EndpointHandler(folder)` once, and calls
it with each body.
"""

import base64
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_finetune.errors import InputError
from wan_finetune.quiet import quiet_imports
from wan_finetune.serving.settings import ServingSettings, read_settings

log = logging.getLogger("wan_finetune.serving")


class EndpointHandler:
    """Clips for `{"inputs": PROMPT, "parameters": {...}}`."""

    def __init__(self, path: str = "") -> None:
        """Open base, adapter and safety filter; `path` is the folder of the adapter's repository.

        Raises:
            InputError: when one of them cannot be had.
        """
        folder = Path(path or ".").resolve()
        settings = read_settings(folder, os.environ)
        if not settings.adapter:
            settings = settings.model_copy(update={"adapter": str(folder)})
        self.generator = open_quietly(settings)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Make a clip.

        Args:
            data: `inputs`, the prompt; `parameters`, optional, keys of `GenerationRequest`.

        Returns:
            `video` (base64), `content_type`, `seed` and `settings`; with `compare` also `base_video`.

        Raises:
            InputError: what is wrong with the request, or that a filter refused it. The service answers with status
                400 and `{"error": MESSAGE}`.
            RuntimeError: something else went wrong; the log has it, and the message nothing of it.
        """
        table = request_table(data)
        try:
            made = self.generator.generate(table)
        except InputError:
            raise
        except Exception as error:
            log.exception("a request failed")
            raise RuntimeError("the clip could not be made; the service's log says why") from error
        answer = {
            "video": base64.b64encode(made.video).decode("ascii"),
            "content_type": "video/mp4",
            "seed": made.request.seed,
            "settings": made.settings,
        }
        if made.base_video is not None:
            answer["base_video"] = base64.b64encode(made.base_video).decode("ascii")
        return answer


def open_quietly(settings: ServingSettings) -> Any:
    """A generator, opened without the libraries' own progress bars."""
    quiet_imports()
    from wan_finetune.quiet import quiet_libraries
    from wan_finetune.serving.generator import open_generator

    quiet_libraries()
    return open_generator(settings, os.environ)


def request_table(data: Any) -> dict[str, Any]:
    """A body as the keys of a request; raises InputError where it has another shape."""
    if not isinstance(data, Mapping):
        raise InputError('the body must be a JSON object such as {"inputs": "a red fox", "parameters": {"seed": 7}}')
    if unknown := sorted(str(key)[:60] for key in data if key not in ("inputs", "parameters")):
        raise InputError(f"unknown key {unknown[0]!r} in the body; known are inputs and parameters")
    prompt, parameters = data.get("inputs"), data.get("parameters") or {}
    if not isinstance(prompt, str):
        raise InputError("inputs must be the prompt, a string")
    if not isinstance(parameters, Mapping):
        raise InputError("parameters must be a JSON object")
    if "prompt" in parameters:
        raise InputError("the prompt goes into inputs, not into parameters")
    return {**parameters, "prompt": prompt}
