"""Putting files into a repository of the Hub: one commit, tried again where that may help, never made twice."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError
from .hub_patience import Patience, PushError, Refused, Unsettled, persevere
from .hub_xet import XetFailed, bounded_xet

if TYPE_CHECKING:
    from huggingface_hub import HfApi

RepoType = Literal["model", "space"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A repository, and how it is made where there is none."""

    name: str
    """`user/repo`."""
    kind: RepoType = "model"
    private: bool = True
    """Whether nobody else may see it. A repository that others see is refused unless this is false."""
    branch: str | None = None
    """Left out: `main`. One that is not there is made."""

    @property
    def place(self) -> str:
        """Where it is on the Hub, as addresses have it."""
        return f"spaces/{self.name}" if self.kind == "space" else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a push came to."""

    url: str
    commit: str
    is_new: bool
    """Whether there was anything to commit: the same files again make no commit."""
    is_private: bool


def require_repo_name(name: str, where: str = "") -> None:
    """Whether `name` can be a repository's.

    Raises:
        InputError: it cannot; `where` says who gave it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    remedy = "give user/repo: letters, digits, '-', '_' and '.', such as acme/brand-look"
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"{where}{name!r} is no name of a repository; {remedy}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{where}{name!r} is no name of a repository: {first_sentence(error)}; {remedy}") from None


def first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split(":")[0].rstrip(".").splitlines()[0]


def require_login() -> str:
    """The token of this machine's login, or of HF_TOKEN.

    Raises:
        InputError: there is none, or the Hub is switched off.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if token := get_token():
        return token
    raise InputError("not logged in to the Hub; run `hf auth login` with a token that may write, or set HF_TOKEN")


def push(
    target: Target,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    is_ours: Callable[[str], bool] = lambda name: False,
    api: "HfApi | None" = None,
    patience: Patience = Patience(),  # noqa: B008
    tell: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Put files into a repository in one commit, making the repository where there is none.

    What is already there is not committed again, so a commit whose answer was lost is recognised, and the same push may
    be repeated at any time.

    Args:
        files: name in the repository -> a file, or its content.
        is_ours: whether a file that the repository has and `files` has not is one that an earlier push left.
        sleep: for tests.

    Raises:
        InputError: no login, or a public repository where a private one is wanted.
        PushError: it failed for good; what to do about it is in the message.
    """
    from huggingface_hub import HfApi

    from .hub_client import careful_client

    api = api or HfApi(token=require_login())
    by_xet = True

    def attempt(seconds_left: float) -> Pushed:
        nonlocal by_xet
        with careful_client(patience, seconds_left), judged(target), ExitStack() as open_files:
            info = look(api, target)
            operations = changes(files, {each.rfilename for each in info.siblings or []}, is_ours)
            try:
                with bounded_xet(patience, sum(map(size_bytes, files.values()))) if by_xet else nullcontext():
                    return commit(api, target, info, operations if by_xet else opened(operations, open_files), message)
            except XetFailed:
                by_xet = False
                raise

    with quiet_hub():
        return persevere(attempt, patience, tell, sleep)


def look(api: "HfApi", target: Target) -> Any:
    """What the Hub says of the repository; it is made where there is none.

    Raises:
        InputError: others see it, and that is not wanted.
    """
    info = find(api, target) or make(api, target)
    if target.private and not info.private:
        raise InputError(
            f"{target.place} is public on the Hub, and what is pushed there can be seen by everybody; "
            "say so with --public, or give another name"
        )
    return info


def changes(files: Mapping[str, Path | bytes], there: set[str], is_ours: Callable[[str], bool]) -> list[Any]:
    """What is to be done to a repository that holds the files `there`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    outdated = sorted(name for name in there - files.keys() if is_ours(name))
    return [
        *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
        *(CommitOperationDelete(name) for name in outdated),
    ]


def opened(operations: Sequence[Any], open_files: ExitStack) -> list[Any]:
    """The same with files opened, which huggingface_hub does not send by Xet."""
    from huggingface_hub import CommitOperationAdd

    return [
        CommitOperationAdd(each.path_in_repo, open_files.enter_context(open(each.path_or_fileobj, "rb")))
        if isinstance(each, CommitOperationAdd) and isinstance(each.path_or_fileobj, str)
        else each
        for each in operations
    ]


def commit(api: "HfApi", target: Target, info: Any, operations: Sequence[Any], message: str) -> Pushed:
    """One commit upon the state that was seen."""
    done = api.create_commit(
        target.name,
        operations,
        commit_message=message,
        repo_type=target.kind,
        revision=target.branch,
        # Upon any other state the Hub refuses it: one of a try before, say, that was still on its way.
        parent_commit=info.sha,
    )
    return Pushed(
        url=f"{api.endpoint}/{target.place}",
        commit=done.oid,
        is_new=done.oid != info.sha,
        is_private=bool(info.private),
    )


def size_bytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def find(api: "HfApi", target: Target) -> Any | None:
    """What the Hub says of a repository's branch, or None where there is no such repository or branch."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.repo_info(target.name, repo_type=target.kind, revision=target.branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def make(api: "HfApi", target: Target) -> Any:
    """Make the repository, and the branch; where another process made them meanwhile, that is as well."""
    from huggingface_hub.errors import HfHubHTTPError

    sdk = "gradio" if target.kind == "space" else None
    try:
        api.create_repo(target.name, repo_type=target.kind, private=target.private, space_sdk=sdk)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    if target.branch:
        api.create_branch(target.name, branch=target.branch, repo_type=target.kind, exist_ok=True)
    info = find(api, target)
    if info is None:
        raise PushError(
            f"{target.place} can neither be seen nor made: it exists, and this login may not see it. Check the name, "
            "and `hf auth whoami`"
        )
    return info


@contextmanager
def judged(target: Target) -> Iterator[None]:
    """Errors of a try as what they mean: try again (`Unsettled`), or give up with a remedy (`PushError`)."""
    from huggingface_hub.errors import HfHubHTTPError

    from .hub_client import found_in

    try:
        yield
    except (Unsettled, PushError, InputError):
        raise
    except Exception as error:
        if isinstance(found := found_in(error, (Refused,)), Refused):
            raise PushError(refusal(found.status, target)) from error
        if found := found_in(error, (Unsettled,)):
            raise found from error
        if isinstance(found := found_in(error, (HfHubHTTPError,)), HfHubHTTPError):
            raise judge_answer(found, target) from error
        if isinstance(error, ValueError) and "LFS batch API returned errors" in str(error):
            raise Unsettled("the storage refuses a file") from error
        raise


def judge_answer(error: Any, target: Target) -> Exception:
    """What an answer of 400 to 499 calls for."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:200]
    said = f" ({said})" if said else ""
    if status in (409, 412):
        return Unsettled("another commit came between")
    if status == 404:
        return PushError(
            f"{target.place} was not found{said}: check the name, that the account or organisation exists, and that "
            "this login belongs to it (`hf auth whoami`)"
        )
    if status == 402:
        return PushError(f"the Hub asks for a payment{said}: private storage or a Space's hardware is used up")
    return PushError(f"the Hub answers {status}{said}")


def refusal(status: int, target: Target) -> str:
    """What to do about a login that may not."""
    owner = target.name.split("/")[0]
    if status == 401:
        return (
            "the Hub does not know this login (401): its token has expired or been revoked; run `hf auth login` again "
            "with a token that has the write role, or set HF_TOKEN"
        )
    return (
        f"this login may not write to {target.place} (403): run `hf auth login` with a token that has the write role "
        f"for {owner}, or give a name under your own account (`hf auth whoami` says which)"
    )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """huggingface_hub's own warnings, which name addresses, kept out; its bars only where a person sees them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, unseen = logger.level, not sys.stderr.isatty() and not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if unseen:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if unseen:
            enable_progress_bars()
