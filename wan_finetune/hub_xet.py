"""Limits on Xet, which sends large files past our client, with tries and waits of its own.

Its own settings do not bound it: told to make 4 tries within 60 s, hf_xet 1.8 took 78 s over a storage that answers
500, 133 s over a closed port, and was not done with a silent one after 280 s. So it has one try, within a time that
grows with the size; after that the files go the older way, which huggingface_hub takes for open files, and in which
every byte is seen.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .hub_patience import Patience, Refused, Unsettled

LIMITS = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "500ms",
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "10s",
}
"""Read by hf_xet when it starts; what the user has set stays."""
SLOWEST_BYTES_PER_SECOND = 128 << 10
"""A connection below this is taken for one that stands still."""


class XetFailed(Unsettled):
    """Files could not be sent by Xet."""


@contextmanager
def bounded_xet(patience: Patience, size_bytes: int) -> Iterator[None]:
    """Xet ends inside, one way or another.

    Raises:
        XetFailed: it failed, or took too long.
        Refused: the Hub gives this login no leave to send.
    """
    from huggingface_hub.utils._xet import abort_xet_session

    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    watch = threading.Timer(patience.xet_seconds + size_bytes / SLOWEST_BYTES_PER_SECOND, abort_xet_session)
    watch.daemon = True
    watch.start()
    try:
        yield
    except Exception as error:
        if not is_of_xet(error):
            raise
        if type(error).__name__ == "XetAuthenticationError":
            raise Refused(403) from error
        if match := re.search(r"\((401|403) .*xet-write-token", str(error)):
            raise Refused(int(match[1])) from error
        idle = min(time.monotonic() - began, patience.xet_seconds)
        raise XetFailed("sending files by Xet failed, the next try goes without it", idle_seconds=idle) from error
    finally:
        watch.cancel()


def is_of_xet(error: Exception) -> bool:
    """Its client raises built-in errors; the call that failed says where they are from."""
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_code.co_name, trace.tb_next
    return last == "_upload_xet_files"
