"""The Gradio app of a Space, and the same at home: `python app.py`, or `python -m wan_finetune.serving.space.app`.

At home it listens on 127.0.0.1 alone and shares nothing; on a Space, where `SPACE_ID` is set, on all interfaces of its
container. `settings.json` beside this file says what is served.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_finetune.errors import InputError
from wan_finetune.quiet import quiet_imports
from wan_finetune.serving.settings import ServingSettings, read_settings

if TYPE_CHECKING:
    import gradio

    from wan_finetune.serving.generator import Generator, Made

    Attempt = Callable[[dict[str, Any]], Made | dict[str, str]]
    """From a request to what was made, or to the reason why nothing was, by language."""

QUEUE_LENGTH = 16
"""Requests that may wait; more are turned away."""
KEPT_CLIPS = 32
"""Files of clips on disk, the newest."""
KEPT_SECONDS = 3600
"""How long gradio keeps its own copies."""
GPU_FLOPS = 3e14
"""Operations a second that a data centre's GPU reaches in bf16; what a ZeroGPU's reservation is reckoned with."""

log = logging.getLogger("wan_finetune.serving")


def main() -> int:
    """Open what is served and listen until stopped; 2 for settings that cannot be served."""
    # ZeroGPU's package has to come before anything that touches CUDA.
    on_gpu = gpu_decorator()
    # Nothing is sent to gradio's makers, and prompts are not kept in browsers that others may use next.
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        os.environ.setdefault(name, "False")
    quiet_imports()
    from wan_finetune.quiet import quiet_libraries
    from wan_finetune.serving.generator import open_generator

    quiet_libraries()
    try:
        settings = read_settings(Path(__file__).resolve().parent, os.environ)
        generator = open_generator(settings, os.environ)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    demo = build(generator, on_gpu(attempting(generator)))
    import gradio

    # With `api_open`, a program's requests would pass by the queue.
    demo.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1, api_open=False).launch(
        server_name="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1",
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=["api"],
        # Themes fetch their fonts from elsewhere unless these are the system's.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        allowed_paths=[],
    )
    return 0


def attempting(generator: "Generator") -> "Attempt":
    """Generating as ZeroGPU needs it: in a process of its own, from which no exception comes back as it was."""
    from wan_finetune.safety import Refused

    def attempt(table: dict[str, Any]) -> "Made | dict[str, str]":
        try:
            return generator.generate(table)
        except Refused as refusal:
            return refusal.texts
        except InputError as error:
            return dict.fromkeys(("en", "zh"), str(error))

    return attempt


def gpu_decorator() -> "Callable[[Attempt], Attempt]":
    """ZeroGPU's decorator, reserving as long as a request takes; elsewhere one that changes nothing."""
    try:
        import spaces
    except ImportError:
        return lambda function: function
    decorator: Callable[..., Any] = spaces.GPU(duration=gpu_seconds)
    return decorator


def gpu_seconds(table: Mapping[str, Any]) -> int:
    """Seconds of a GPU that Wan2.2-T2V-A14B takes for a request; with too few it is cut off, with too many it waits."""
    from wan_finetune.costs import MicroBatch, forward_flops
    from wan_finetune.spec import TransformerDims

    width, height, num_frames = (int(table[key]) for key in ("width", "height", "num_frames"))
    batch = MicroBatch(clips=1, width=width, height=height, num_frames=num_frames)
    # Guidance evaluates the denoiser twice.
    evaluations = 2 * int(table["steps"]) * (2 if table.get("compare") else 1)
    return 30 + round(1.25 * evaluations * forward_flops(batch, TransformerDims()).total / GPU_FLOPS)


def texts_of(lang: str) -> dict[str, str]:
    """The labels in a language."""
    from importlib import resources

    path = resources.files("wan_finetune.serving.space") / "texts.json"
    texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))[lang]
    return texts


def build(generator: "Generator", attempt: "Attempt") -> "gradio.Blocks":
    """The page."""
    import gradio

    settings = generator.settings
    texts = texts_of(settings.lang)
    with gradio.Blocks(
        title=settings.title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as demo:
        gradio.Markdown(introduction(settings, texts), elem_id="introduction")
        prompt = gradio.Textbox(
            label=texts["prompt"], info=prompt_hint(settings, texts), lines=3, elem_id="prompt",
            max_length=settings.limits.prompt_characters,
        )  # fmt: skip
        if settings.examples:
            gradio.Examples([[text] for text in settings.examples], [prompt], label=texts["examples"])
        asked = {"prompt": prompt, **settings_panel(settings, texts)}
        make = gradio.Button(texts["make"], variant="primary", elem_id="make")
        status = gradio.Textbox(label=texts["status"], interactive=False, lines=2, elem_id="status")
        with gradio.Row():
            clips = [clip_panel(texts["adapter_clip"], "adapter"), clip_panel(texts["base_clip"], "base")]
        # A filter of which a part is off must not read as if it were on.
        is_on = generator.prompt_filter is not None and generator.frame_filter is not None
        gradio.Markdown(texts["filter_on" if is_on else "filter_off"], elem_id="filter")
        respond = responder(generator, attempt, list(asked), texts)
        make.click(respond, list(asked.values()), [*clips, status], api_name="generate", concurrency_limit=1)
    return demo


def introduction(settings: ServingSettings, texts: Mapping[str, str]) -> str:
    """Title, base and adapter; of a folder the last name alone, so that no path of the machine is shown."""
    names = [Path(name).name if Path(name).is_dir() else name for name in (settings.base, settings.adapter)]
    return f"# {settings.title}\n{texts['intro'].format(base=names[0], adapter=names[1])}"


def prompt_hint(settings: ServingSettings, texts: Mapping[str, str]) -> str:
    trigger = f" {texts['trigger_hint']} {settings.trigger}" if settings.trigger else ""
    return texts["prompt_hint"] + trigger


def settings_panel(settings: ServingSettings, texts: Mapping[str, str]) -> dict[str, Any]:
    """The inputs below the prompt, by the request's keys."""
    import gradio

    sampling, limits = settings.sampling, settings.limits
    side = limits.side // 16 * 16
    compare = gradio.Checkbox(True, label=texts["compare"], elem_id="compare")
    with gradio.Accordion(texts["settings"], open=False, elem_id="settings"):
        with gradio.Row():
            strength_high = gradio.Slider(0, limits.strength, 1.0, step=0.05, label=texts["strength_high"])
            strength_low = gradio.Slider(0, limits.strength, 1.0, step=0.05, label=texts["strength_low"])
        with gradio.Row():
            width = gradio.Slider(16, side, sampling.width, step=16, label=texts["width"])
            height = gradio.Slider(16, side, sampling.height, step=16, label=texts["height"])
        with gradio.Row():
            num_frames = gradio.Slider(1, limits.num_frames, sampling.num_frames, step=4, label=texts["frames"])
            steps = gradio.Slider(1, limits.steps, sampling.steps, step=1, label=texts["steps"])
        seed = gradio.Number(None, precision=0, label=texts["seed"], elem_id="seed")
        negative = gradio.Textbox(sampling.negative_prompt, label=texts["negative"], elem_id="negative")
    return {
        "negative_prompt": negative, "seed": seed, "width": width, "height": height, "num_frames": num_frames,
        "steps": steps, "strength_high": strength_high, "strength_low": strength_low, "compare": compare,
    }  # fmt: skip


def clip_panel(label: str, name: str) -> Any:
    import gradio

    return gradio.Video(
        label=label,
        elem_id=name,
        interactive=False,
        autoplay=True,
        loop=True,
        buttons=["download"],
        include_audio=False,
    )


def responder(
    generator: "Generator", attempt: "Attempt", keys: list[str], texts: Mapping[str, str]
) -> Callable[..., tuple[str | None, str | None, str]]:
    """What a click does: clips and a line about them, or no clip and the reason."""
    from wan_finetune.safety import Refused
    from wan_finetune.serving.generator import content_name

    settings = generator.settings
    folder = Path(tempfile.mkdtemp(prefix="wan-finetune-clips-"))

    def written(video: bytes | None) -> str | None:
        if video is None:
            return None
        path = folder / content_name(video)
        path.write_bytes(video)
        return str(path)

    def respond(*values: Any) -> tuple[str | None, str | None, str]:
        table = dict(zip(keys, values, strict=True))
        try:
            # Checked before a GPU is waited for.
            made = attempt(generator.check(table).model_dump())
        except InputError as error:
            made = error.texts if isinstance(error, Refused) else {settings.lang: str(error)}
        except Exception:
            log.exception("a request failed")
            made = {settings.lang: texts["failed"]}
        if isinstance(made, dict):
            return None, None, made[settings.lang]
        old = sorted(folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime)[:-KEPT_CLIPS]
        for path in old:
            path.unlink()
        return written(made.video), written(made.base_video), texts["done"].format(**made.request.model_dump())

    return respond


if __name__ == "__main__":
    sys.exit(main())
