"""The HTTP client behind huggingface_hub while we push: bounded waits, one kind of error for all that may pass.

huggingface_hub sets no time limits, repeats some requests up to six times, and the commit never. Its extension point is
the client: this one turns every fault that may pass into `Unsettled`, which huggingface_hub does not catch, so that one
place decides about trying again.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from .hub_patience import Patience, Refused, Unsettled

MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
PARTS = {
    "/commit/": "the commit",
    "/preupload/": "the question how files are to be sent",
    "/objects/batch": "the question where files go",
    "/repos/create": "creating the repository",
    "/validate-yaml": "the check of the card",
    "/branch/": "creating the branch",
}
"""What a request is for, by a part of its path. Addresses themselves hold signatures, so none is told."""


@contextmanager
def careful_client(patience: Patience, seconds_left: float) -> Iterator[None]:
    """huggingface_hub speaks through a `CarefulClient` inside; its usual client comes back afterwards.

    The client is the process's: nothing else may talk to the Hub meanwhile.
    """
    set_client_factory(lambda: CarefulClient(patience, seconds_left))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


class CarefulClient(httpx2.Client):
    """A client whose requests end, and say how."""

    def __init__(self, patience: Patience, seconds_left: float) -> None:
        self.patience = patience
        stall = max(0.05, min(patience.stall_seconds, seconds_left))
        super().__init__(follow_redirects=True, timeout=httpx2.Timeout(stall, connect=min(10.0, stall)))

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """One request, its answer read to the end.

        Raises:
            Unsettled: no whole answer came, or one of MAY_PASS.
            Refused: 401 or 403 to a request with a login.
        """
        what = purpose(request)
        traffic = Traffic()
        request.stream = Counted(request.stream, traffic)
        # Some callers say "no limit" for their own request.
        request.extensions = {**request.extensions, "timeout": self.timeout.as_dict()}
        try:
            response = super().send(request, stream=True, **options)
            response.stream = Counted(response.stream, traffic, time.monotonic() + self.patience.answer_seconds)
            response.read()
        except httpx2.TransportError as error:
            raise Unsettled(f"{what}: {reason(error)}", idle_seconds=traffic.idle_seconds) from error
        if fault := fault_of(response):
            after = retry_after_seconds(response)
            raise Unsettled(f"{what}: {fault}", idle_seconds=traffic.idle_seconds, retry_after_seconds=after)
        if response.status_code in (401, 403):
            if "authorization" in request.headers:
                raise Refused(response.status_code)
            # A storage's address that has expired; the next try is given another one.
            raise Unsettled(f"{what}: the storage answers {response.status_code}", idle_seconds=traffic.idle_seconds)
        return response


class Traffic:
    """When a byte of a request last moved."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self.last


class Counted(httpx2.SyncByteStream):
    """A body that notes when its parts pass, and stops at a deadline."""

    def __init__(self, inner: Any, traffic: Traffic, deadline: float | None = None) -> None:
        self.inner, self.traffic, self.deadline = inner, traffic, deadline

    def __iter__(self) -> Iterator[bytes]:
        for part in self.inner:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise httpx2.ReadTimeout("the answer drips")
            yield part
            # An answer that drips has not moved in any sense that matters.
            if self.deadline is None:
                self.traffic.last = time.monotonic()

    def close(self) -> None:
        if hasattr(self.inner, "close"):
            self.inner.close()


def purpose(request: httpx2.Request) -> str:
    """What a request is for."""
    if request.method == "PUT":
        return "sending a file"
    return next((name for part, name in PARTS.items() if part in request.url.path), "asking for the repository")


def reason(error: httpx2.TransportError) -> str:
    """What broke off, in a few words without addresses."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return "no connection"
    if isinstance(error, httpx2.TimeoutException):
        return "nothing came for too long"
    return "the connection was cut"


def fault_of(response: httpx2.Response) -> str:
    """What is wrong with an answer that may be another one next time; empty where nothing is."""
    if response.status_code in MAY_PASS:
        return f"the Hub answers {response.status_code}"
    if response.status_code == 409 and "conflicting operation is in progress" in response.text:
        # huggingface_hub asks again for ever, without a pause.
        return "the Hub is busy with another operation on it"
    if "json" in response.headers.get("content-type", "") and response.content:
        try:
            json.loads(response.content)
        except ValueError:
            return "the answer was cut short"
    return ""


def retry_after_seconds(response: httpx2.Response) -> float | None:
    """`Retry-After`, in seconds or as a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def found_in(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first error of these kinds among an error and what caused it; uploads are wrapped on their way."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        if (each := queue.pop(0)) is None or each in seen:
            continue
        if isinstance(each, kinds):
            return each
        seen.append(each)
        queue += [each.__cause__, each.__context__]
    return None
