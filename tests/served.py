"""Processes that serve, each with the folder that it is served from and nothing of the checkout."""

import importlib.util
import json
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fork_server import Child, fork
from tests.test_adapters import trained
from wan_finetune.experts import HIGH, LOW
from wan_finetune.export import write_adapter_folder

SAMPLING = {"width": 64, "height": 32, "num_frames": 5, "steps": 2, "guidance_scale": 2.0, "guidance_scale_2": 1.5}
"""Quick on the tiny base."""
RED = {"prompt": "夜空中，一个红色的圆形", "seed": 7}
LEFT_AT_HOME = ("wan_finetune", "data", "train")
NOT_REQUIRED = ("decord", "rich", "tomli_w", "xxhash", "cv2", "scenedetect")
"""What the checkout has and a served folder's requirements.txt does not name."""


def lay_out(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Files as a repository of the Hub has them."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def leave_checkout(*brought: str) -> None:
    """Forget the checkout's modules, where they lie, and what is not installed where they are served."""
    missing = [name for name in NOT_REQUIRED if name not in brought]
    for name in [name for name in sys.modules if name.split(".")[0] in (*LEFT_AT_HOME, *missing)]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None makes an import fail
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.path = [path for path in sys.path if not (Path(path or ".") / "wan_finetune").is_dir()]
    sys.addaudithook(tell_of_other_hosts)


def tell_of_other_hosts(event: str, arguments: tuple[Any, ...]) -> None:
    """Every name that is looked up and every address that is connected to, loopback apart, has a line in the log."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        print(f"ANOTHER HOST: {host}", flush=True)


def run_app(folder: Path) -> int:
    """In a child: `python app.py` in a Space's folder."""
    leave_checkout("rich")  # gradio's
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    return run(lambda: runpy.run_path("app.py", run_name="__main__"), folder)


def run_server(home: Path, arguments: Sequence[str]) -> int:
    """In a child: `python -m wan_finetune.serving.server` where the library lies in `home`, from another folder."""
    leave_checkout()
    sys.path.insert(0, str(home))
    sys.argv = ["server", *arguments]
    return run(lambda: runpy.run_module("wan_finetune.serving.server", run_name="__main__"), home)


def run(program: Any, home: Path) -> int:
    try:
        program()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        check_home(home)
    return 0


def check_home(home: Path) -> None:
    """The library is the one that was laid out."""
    for name, module in sys.modules.items():
        if name.split(".")[0] in LEFT_AT_HOME and getattr(module, "__file__", None):
            assert Path(module.__file__).is_relative_to(home), f"{name} came from {module.__file__}"


def call_endpoint(folder: Path, bodies: Sequence[Any], out: Path) -> int:
    """In a child: what huggingface-inference-toolkit does with a repository's handler.py, and then with each body."""
    leave_checkout()
    os.chdir(out.parent)
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    answers = []
    for body in bodies:
        try:
            answers.append([200, json.loads(json.dumps(handler(body)))])
        except Exception as error:
            answers.append([400, {"error": str(error)}])
    out.write_text(json.dumps(answers), encoding="utf-8")
    check_home(folder)
    return 0


def write_adapter(base: Path, folder: Path) -> Path:
    """An adapter folder for a base with two experts, with weights as after some training."""
    write_adapter_folder(folder, [trained(base, expert) for expert in (HIGH, LOW)])
    return folder


def start(target: Any, *arguments: Any, log: Path, environment: Mapping[str, str]) -> Child:
    return fork(target, *arguments, log=log, environment=environment)
