"""What is put on the Hub so that an adapter is served there: the files of a Space, and those beside an adapter."""

import json
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

from pydantic import ValidationError

from ..errors import InputError
from .settings import FILE_NAME, ServingSettings, explain

SDK_VERSION = "6.31.0"
"""Of gradio, as tested."""
PYTHON_VERSION = "3.12"
LIBRARY = Path(__file__).resolve().parent.parent
POCKET_SAMPLING = {
    "width": 64, "height": 64, "num_frames": 9, "steps": 16, "guidance_scale": 3.0, "guidance_scale_2": 3.0
}  # fmt: skip
"""What the pocket model draws; every other base is taken for Wan2.2-T2V-A14B or a like one."""


def space_files(
    *, base: str, adapter_repo: str, trigger: str, title: str, examples: list[str], lang: str, **more: str
) -> dict[str, bytes]:
    """Path -> content of a Gradio Space that shows an adapter.

    Args:
        base: a repository of the Hub, or `pocket`, whose weights then travel along.
        adapter_repo: the adapter's repository.
        trigger: put into every prompt that does not say it; may be empty.
        title: one line.
        examples: prompts to offer, without the trigger.
        lang: `en` or `zh`, of the labels.
        more: further keys of `ServingSettings`, such as `template`.

    Raises:
        InputError: for a base or adapter that a Space cannot fetch, or another language.
    """
    check_repository("base", base)
    check_repository("adapter", adapter_repo)
    table = serving_table(
        base, adapter=adapter_repo, trigger=trigger, title=" ".join(title.split()), examples=examples, lang=lang, **more
    )
    folder = LIBRARY / "serving" / "space"
    return {
        "app.py": (folder / "app.py").read_bytes(),
        "requirements.txt": (folder / "requirements.txt").read_bytes(),
        "README.md": space_card(table).encode(),
        FILE_NAME: as_json(table),
        **library_files(with_pocket_model=base == "pocket"),
    }


def endpoint_files(*, base: str, **more: str) -> dict[str, bytes]:
    """Path -> content of what lies beside an adapter's files so that an Inference Endpoint serves it.

    Args:
        base: as for a Space.
        more: further keys of `ServingSettings`, such as `template`.

    Raises:
        InputError: for a base that an endpoint cannot fetch.
    """
    check_repository("base", base)
    folder = LIBRARY / "serving" / "endpoint"
    return {
        "handler.py": (folder / "handler.py").read_bytes(),
        "requirements.txt": (folder / "requirements.txt").read_bytes(),
        FILE_NAME: as_json(serving_table(base, **more)),
        **library_files(with_pocket_model=base == "pocket"),
    }


def check_repository(what: str, name: str) -> None:
    """Raises InputError for what is no repository of the Hub: it could not be fetched, and a path would leak."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if what == "base" and name == "pocket":
        return
    try:
        if name.count("/") != 1:
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        hint = "Wan-AI/Wan2.2-T2V-A14B-Diffusers" if what == "base" else "user/my-look"
        raise InputError(
            f"{what} {Path(name).name!r} is no repository of the Hub, and what runs there has to fetch it; "
            f"name one as user/name, such as {hint}"
        ) from None


def serving_table(base: str, **more: Any) -> dict[str, Any]:
    """A `settings.json` that says what differs from the defaults, checked."""
    table = {"base": base, **more, **({"sampling": POCKET_SAMPLING} if base == "pocket" else {})}
    try:
        ServingSettings.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error)) from None
    return table


def as_json(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, ensure_ascii=False, indent=1) + "\n").encode()


def space_card(table: dict[str, Any]) -> str:
    """README.md of a Space: its configuration as front matter, and a page."""
    from huggingface_hub import SpaceCardData

    card = SpaceCardData(
        title=table["title"],
        sdk="gradio",
        sdk_version=SDK_VERSION,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license="apache-2.0",
        models=[name for name in (table["adapter"], table["base"]) if "/" in name],
        tags=["text-to-video", "lora", "wan2.2"],
        pinned=False,
    )
    page = (LIBRARY / "serving" / "space" / "README.md").read_text(encoding="utf-8")
    base = table["base"]
    shown = f"[{base}](https://huggingface.co/{base})" if "/" in base else "a small model that lies beside the app"
    page = Template(page).substitute(adapter=table["adapter"], base=shown)
    return f"---\n{card.to_yaml()}\n---\n# {table['title']}\n\n{page}"


def library_files(*, with_pocket_model: bool) -> dict[str, bytes]:
    """The library, so that what is served is made by the code that made the previews.

    The toolkit is on no package index. The pocket model's weights stay away unless it is the base.
    """
    model = LIBRARY / "pocket" / "model"
    files = {}
    for path in sorted(LIBRARY.rglob("*")):
        wanted = path.suffix in (".py", ".json", ".txt", ".md") or (with_pocket_model and path.is_relative_to(model))
        if not path.is_file() or not wanted or "__pycache__" in path.parts:
            continue
        if path.is_relative_to(model) and not with_pocket_model:
            continue
        files[f"{LIBRARY.name}/{path.relative_to(LIBRARY).as_posix()}"] = path.read_bytes()
    if (text := licence()) is not None:
        files[f"{LIBRARY.name}/LICENSE"] = text
    return files


def licence() -> bytes | None:
    """The library's licence, of a checkout or an installed package; None where neither has it."""
    if (path := LIBRARY.parent / "LICENSE").is_file() and (LIBRARY.parent / "pyproject.toml").is_file():
        return path.read_bytes()
    try:
        text = metadata.distribution("wan-finetune").read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        return None
    return None if text is None else text.encode()
