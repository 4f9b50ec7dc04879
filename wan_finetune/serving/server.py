"""A local server with the endpoint's own handler: `python -m wan_finetune.serving.server --folder ADAPTER`.

It listens on 127.0.0.1 unless told otherwise, makes one clip at a time, lets one request wait, and turns others away.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from wan_finetune.errors import InputError
from wan_finetune.safety import Refused

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    Handler = Callable[[Any], dict[str, Any]]

MAX_BODY_BYTES = 64 * 1024
"""A prompt and its parameters; more is no request."""
BODY_SECONDS = 10
"""How long a body may take to arrive."""
MOST_AT_ONCE = 2
"""Requests in the house: one is made, one waits."""
RETRY_SECONDS = 30
SHUTDOWN_SECONDS = 30
"""How long a clip that is being made may still take after SIGTERM."""

Result = TypeVar("Result")


class Fault(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, **more: str) -> None:
        super().__init__(message)
        self.status = status
        self.content = {"error": message, **more}


class Service:
    """A handler that is opened in the background, and the queue before it."""

    def __init__(self, open_handler: "Callable[[], Handler]", on_failure: Callable[[Exception], None]) -> None:
        self.open_handler = open_handler
        self.on_failure = on_failure
        self.handler: Handler | None = None
        self.inside = 0
        self.turn = asyncio.Lock()

    async def open(self) -> None:
        """Open the handler; until then every request is answered with 503."""
        try:
            self.handler = await in_thread(self.open_handler)
        except Exception as error:
            # Whatever it is, a server that never gets ready must not look as if it were about to.
            self.on_failure(error)

    async def answer(self, request: "Request") -> dict[str, Any]:
        """What the handler makes of a body; raises Fault."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Asked of browsers too, it keeps other sites' pages from posting here unasked.
            raise Fault(415, "send the request as application/json")
        data = parsed(await body_of(request))
        if self.handler is None:
            raise Fault(503, "the model is still being loaded; try again later")
        if self.inside >= MOST_AT_ONCE:
            raise Fault(429, "one clip is being made and one waits; try again later")
        self.inside += 1
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise Fault(499, "the client has gone")
                return await in_thread(self.handler, data)
        except Refused as refusal:
            raise Fault(422, str(refusal), category=refusal.category) from None
        except InputError as error:
            raise Fault(422, str(error)) from None
        except RuntimeError as error:
            raise Fault(500, str(error)) from None
        finally:
            self.inside -= 1


async def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call it in a thread that nothing waits for at the end: a clip takes minutes, and stopping should not."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def deliver(outcome: Result | Exception) -> None:
        if done.done():
            return
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    def work() -> None:
        outcome: Result | Exception
        try:
            outcome = function(*arguments)
        except Exception as error:
            outcome = error
        # The loop may be closed by now, and then nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=work, daemon=True).start()
    return await done


async def body_of(request: "Request") -> bytes:
    """The body, no more than is allowed of it and no longer than it may take."""
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise Fault(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise Fault(408, f"the request did not arrive within {BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise Fault(499, "the client has gone") from None
    return bytes(body)


def parsed(body: bytes) -> Any:
    """A body's JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Fault(422, "the body is not valid JSON") from None


def make_app(service: Service) -> "Starlette":
    """`POST /` makes a clip, `GET /health` says whether it can."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def health(request: "Request") -> "Response":
        if service.handler is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ready"})

    async def predict(request: "Request") -> "Response":
        try:
            answer = await service.answer(request)
        except Fault as fault:
            headers = {"retry-after": str(RETRY_SECONDS)} if fault.status in (429, 503) else {}
            # What is left of a body that was not read would be taken for the next request.
            headers |= {"connection": "close"} if fault.status in (408, 413) else {}
            return JSONResponse(fault.content, fault.status, headers)
        if request.headers.get("accept") == answer["content_type"]:
            seed = {"x-seed": str(answer["seed"])}
            return Response(base64.b64decode(answer["video"]), headers=seed, media_type=answer["content_type"])
        return JSONResponse(answer)

    @asynccontextmanager
    async def lifespan(app: "Starlette") -> AsyncIterator[None]:
        opening = asyncio.create_task(service.open())
        yield
        opening.cancel()

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/", predict, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped; 2 where settings, adapter, base or safety filter cannot be had."""
    arguments = make_parser().parse_args(argv)
    try:
        import uvicorn
    except ImportError:
        print("error: the server needs starlette and uvicorn; pip install starlette uvicorn", file=sys.stderr)
        return 2
    from .endpoint.handler import EndpointHandler

    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(lambda: EndpointHandler(str(arguments.folder)), stop)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            host=arguments.host,
            port=arguments.port,
            server_header=False,
            limit_concurrency=64,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    server.run()
    if not failures:
        return 0
    if not isinstance(failures[0], InputError):
        raise failures[0]
    print(f"error: {failures[0]}", file=sys.stderr, flush=True)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m wan_finetune.serving.server", description="Serve an adapter over HTTP, one clip at a time."
    )
    parser.add_argument("--folder", type=Path, default=Path("."), help="adapter folder, with settings.json or without")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7861)
    return parser


if __name__ == "__main__":
    sys.exit(main())
