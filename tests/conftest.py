"""What every test stands on: no network, no user's settings, one thread."""

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from train.config import Config

HF_HOME = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    # An empty home keeps the user's token, cached models and accelerate configuration out of the tests.
    config.stash[HF_HOME] = tempfile.mkdtemp(prefix="wan-finetune-tests-")
    os.environ.update(
        HF_HOME=config.stash[HF_HOME],
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        WANDB_MODE="offline",
        # torch reads this when it is first imported, here and in every process that a test starts: one thread gives the
        # same bytes on every machine, and on a busy one it is also faster than two.
        OMP_NUM_THREADS="1",
    )
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        os.environ.pop(name, None)
    # How long an example takes says more about the machine than about the code.
    settings.register_profile("wan-finetune", deadline=None)
    settings.load_profile("wan-finetune")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[HF_HOME], ignore_errors=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium, for playwright's `executable_path`."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail(
        "no Chromium on PATH; ./launch.sh test installs it as root on Debian, elsewhere install it and a Chinese font "
        "(Debian: apt-get install chromium fonts-wqy-zenhei)"
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan2.2-shaped diffusers folder with both experts."""
    from tests.tiny_model import write_tiny_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Brand clips and caches that all trainings share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def make_config(tiny_base: Path, shared: Path, tmp_path: Path) -> "Callable[..., Config]":
    """A quick run of the pocket configuration on the tiny base; overrides may follow."""
    from tests.tiny_runs import tiny_config

    return functools.partial(tiny_config, tiny_base, shared, tmp_path)


@pytest.fixture(autouse=True)
def signals_are_given_back() -> Iterator[None]:
    """A test that runs a job in this process leaves no handler behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
