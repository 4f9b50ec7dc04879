"""A push in a child, where Xet may start threads of its own."""

from pathlib import Path


def push_by_xet(url: str, token: str, folder: Path) -> int:
    """Push the files of a folder, Xet first, with limits that fit a test; 1 where it fails."""
    from huggingface_hub import HfApi, constants

    from wan_finetune.hub import Target, push
    from wan_finetune.hub_patience import Patience, PushError

    constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_XET = False
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir())}
    try:
        done = push(
            Target(name="acme/look"),
            files,
            message="Adapter",
            api=HfApi(endpoint=url, token=token),
            patience=Patience(xet_seconds=2.0, first_pause_seconds=0.1),
        )
    except PushError as error:
        print(error)
        return 1
    print(done)
    return 0
