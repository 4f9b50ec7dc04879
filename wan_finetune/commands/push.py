"""`wan-finetune push`: an adapter with its card, samples and figures into a repository of the Hub."""

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..hub_files import Artefacts

MESSAGE = "Adapter, card and samples"


def add_to(commands: Any) -> None:
    """Put the command and its options into the parser."""
    pushing = commands.add_parser("push", help="put an adapter on the Hub: card, files, samples and figures")
    pushing.add_argument("folder", type=Path, metavar="DIR", help="a run's folder, or an adapter folder")
    pushing.add_argument("repo", metavar="user/repo", help="repository on the Hub; made where there is none")
    pushing.add_argument("--public", action="store_true", help="everybody may see it; without this it is private")
    pushing.add_argument("--lang", choices=["en", "zh"], default="en", help="language of the card")
    pushing.add_argument("--license", help="as the Hub names it; left out: what the adapter says, else apache-2.0")
    pushing.add_argument("--base", help="the base model's repository, where the adapter does not name it")
    pushing.add_argument("--keep-card", action="store_true", help="leave the card that the repository has")
    pushing.add_argument("--branch", help="instead of main; made where there is none")
    pushing.add_argument("--message", default=MESSAGE, help="of the commit")
    pushing.add_argument("--space", action="store_true", help="also a Gradio demo, as a Space of its own")
    pushing.add_argument("--space-name", metavar="user/space", help="of the Space; left out: user/repo")
    pushing.add_argument("--endpoint", action="store_true", help="also what an Inference Endpoint needs")
    pushing.add_argument("--dry-run", action="store_true", help="show what would go, and send nothing")
    pushing.set_defaults(command=push_command)


def push_command(arguments: argparse.Namespace) -> None:
    """Check, then push; exit code 1 when the Hub or the way to it fails, with the command to try again."""
    from ..hub import Target, push, require_login, require_repo_name
    from ..hub_files import is_ours, read_artefacts, require_no_leak
    from ..hub_patience import PushError

    require_repo_name(arguments.repo)
    space = arguments.space_name or arguments.repo
    require_repo_name(space, "--space-name: ")
    if not arguments.message.strip():
        raise InputError("--message: is empty; leave it out, or say what changed")
    token = "" if arguments.dry_run else require_login()
    artefacts = read_artefacts(arguments.folder)
    target = Target(name=arguments.repo, private=not arguments.public, branch=arguments.branch)
    files = model_files(artefacts, arguments)
    require_no_leak(files, token)
    # What the toolkit itself writes names places in a container, and is not looked through.
    pushes = [(target, files | endpoint(artefacts, arguments), is_ours)]
    if arguments.space:
        there = Target(name=space, kind="space", private=not arguments.public)
        pushes.append((there, demo_files(artefacts, arguments), lambda name: False))
    if arguments.dry_run:
        for target, files, _ in pushes:
            show(target, files)
        return
    try:
        for target, files, ours in pushes:
            print(f"pushing {len(files)} files, {megabytes(files)}, to {target.place}", flush=True)
            done = push(target, files, message=arguments.message, is_ours=ours, tell=tell)
            what = "" if done.is_new else "nothing has changed there: "
            print(f"{what}{done.url} ({'private' if done.is_private else 'public'})", flush=True)
            if target.kind == "space" and not arguments.public:
                print(
                    "it loads a private adapter: give it HF_TOKEN, a token that may read, as a secret in its settings"
                )
            if arguments.public and done.is_private:
                print("it was private before and stays so; its settings on the Hub change that")
    except (PushError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        tell("stopped" if stopped else f"error: {str(error).replace(token, '***')}")
        tell(f"nothing is lost, {arguments.folder} is as it was; the same again: {again(arguments)}")
        sys.exit(128 + signal.SIGINT if stopped else 1)


def tell(text: str) -> None:
    """One line, not on stdout, which has the result."""
    print(text, file=sys.stderr, flush=True)


def model_files(artefacts: "Artefacts", arguments: argparse.Namespace) -> dict[str, Path | bytes]:
    """What goes into the model's repository."""
    from ..card import make_card
    from ..hub_files import repository_files

    said = artefacts.about.get("licence", "")
    if arguments.license and said and said.lower() != arguments.license.lower():
        tell(f"warning: the card will say {arguments.license}, and the adapter's files say {said} of themselves")
    card = make_card(
        artefacts, repo=arguments.repo, base=arguments.base, language=arguments.lang, license=arguments.license
    )
    files = repository_files(artefacts, card)
    if arguments.keep_card:
        del files["README.md"]
    return files


def endpoint(artefacts: "Artefacts", arguments: argparse.Namespace) -> dict[str, Path | bytes]:
    """What an Inference Endpoint needs beside the adapter."""
    if not arguments.endpoint:
        return {}
    from ..serving.files import endpoint_files

    return dict(endpoint_files(base=arguments.base or artefacts.about["base"], **composing(artefacts)))


def demo_files(artefacts: "Artefacts", arguments: argparse.Namespace) -> dict[str, Path | bytes]:
    """What goes into the Space."""
    from ..serving.files import space_files

    trigger = artefacts.about.get("trigger", "")
    return dict(
        space_files(
            base=arguments.base or artefacts.about["base"],
            adapter_repo=arguments.repo,
            trigger=trigger,
            title=trigger or arguments.repo.split("/")[1],
            # The Space puts the trigger before every prompt itself.
            examples=list(dict.fromkeys(clip.prompt.removeprefix(trigger).lstrip(" ,，") for clip in artefacts.clips)),
            lang=arguments.lang,
            **composing(artefacts),
        )
    )


def composing(artefacts: "Artefacts") -> dict[str, str]:
    """How trigger and prompt become one text, where a run's configuration says it, so that serving does as training."""
    from ..captions import DEFAULT_TEMPLATE

    template = artefacts.configuration.get("data", {}).get("caption", DEFAULT_TEMPLATE)
    return {} if template == DEFAULT_TEMPLATE else {"template": template}


def show(target: Any, files: dict[str, Path | bytes]) -> None:
    """What would go where, and how much it is."""
    from ..hub import size_bytes

    kind = "private" if target.private else "public"
    branch = f", branch {target.branch}" if target.branch else ""
    print(f"{target.place} ({kind}{branch}): {len(files)} files, {megabytes(files)}; nothing is sent")
    for name, content in sorted(files.items()):
        print(f"{size_bytes(content):>14,}  {name}")


def megabytes(files: dict[str, Path | bytes]) -> str:
    from ..hub import size_bytes

    return f"{sum(map(size_bytes, files.values())) / 2**20:.1f} MiB"


def again(arguments: argparse.Namespace) -> str:
    """The command line that does the same."""
    flags = ("public", "space", "endpoint", "keep_card")
    options = [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]
    usual = {
        "lang": "en",
        "license": None,
        "message": MESSAGE,
        "base": None,
        "branch": None,
        "space_name": None,
    }
    for name, default in usual.items():
        if (value := getattr(arguments, name)) != default:
            options += [f"--{name.replace('_', '-')}", value]
    return shlex.join(["wan-finetune", "push", str(arguments.folder), arguments.repo, *options])
