"""launch.sh, without installing anything: arguments, refusals, the second run, signals."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# All that launch.sh may need from the system; a test's PATH holds these and nothing else.
SYSTEM_TOOLS = ("bash", "cat", "cksum", "dirname", "df", "env", "grep", "rm", "sleep")

# Stands for .venv/bin/python: notes each call that is not launch.sh's own `-c`, and runs it for real where asked.
FAKE_PYTHON = """\
import json, os, pathlib, sys, time
if sys.argv[1:2] != ["-c"]:
    with open({log!r}, "a") as log:
        log.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}) + "\\n")
    if {hang_in_pip} and sys.argv[-1] == "torch":
        pathlib.Path("pip-pid").write_text(str(os.getpid()))
        time.sleep(60)
    if {record_only}:
        sys.exit(0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""

# Stands for the system's Python: `-m venv` makes an environment of the fake above.
FAKE_SYSTEM_PYTHON = """\
import os, pathlib, shutil, sys
if sys.argv[1:4] != ["-m", "venv", "--clear"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
folder = pathlib.Path(sys.argv[4])
shutil.rmtree(folder, ignore_errors=True)
(folder / "bin").mkdir(parents=True)
shutil.copy({inner!r}, folder / "bin" / "python")
"""

# A trainer: says that it is ready, and on a signal takes a moment to save, as the real one does.
FAKE_TRAINER = """\
import os, pathlib, signal, sys, time
rank = os.environ.get("RANK", "0")
def stop(number, frame):
    time.sleep(0.3)
    pathlib.Path("saved-" + rank).write_text(signal.Signals(number).name)
    sys.exit(143)
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
pathlib.Path("ready-" + rank).write_text(str(os.getpid()))
time.sleep(60)
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def write_python_script(path: Path, text: str) -> None:
    # Not by a shebang: the interpreter's path may hold spaces.
    code = path.with_name(path.name + "-code.py")
    write_script(code, text)
    write_script(path, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(code))} "$@"\n')


@dataclass
class Checkout:
    """A copy of what launch.sh touches, with a PATH of its own."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.root.parent / "calls.jsonl"

    @property
    def tools(self) -> Path:
        return self.root.parent / "tools"

    def calls(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def fake_python(self, path: Path, *, record_only: bool = True, hang_in_pip: bool = False) -> None:
        text = FAKE_PYTHON.format(
            python=sys.executable, log=str(self.log), record_only=record_only, hang_in_pip=hang_in_pip
        )
        write_python_script(path, text)

    def install(self, *, record_only: bool = True) -> None:
        """What a finished installation leaves: an interpreter and stamps made by launch.sh's own rule."""
        self.fake_python(self.root / ".venv" / "bin" / "python", record_only=record_only)
        for extras in ("train", "train,test"):
            text = f"{self.root}\n{extras}\n" + "".join(
                (self.root / name).read_text() for name in ("pyproject.toml", "constraints.txt")
            )
            stamp = subprocess.run(["cksum"], input=text, capture_output=True, text=True, check=True).stdout
            (self.root / ".venv" / f"installed-{extras}").write_text(stamp)

    def fake_df(self, *, free_kib: int) -> None:
        (self.tools / "df").unlink(missing_ok=True)
        write_script(self.tools / "df", f"#!/bin/sh\necho Filesystem 1024-blocks\necho /dev/x 9 1 {free_kib} 9% /\n")

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "launch.sh", *arguments],
            cwd=cwd or self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([self.root / "launch.sh", *arguments], cwd=self.root, env=self.env)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path / "a checkout")
    (made.root / "configs").mkdir(parents=True)
    made.tools.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, made.root / name)
    (made.root / "configs" / "pocket.toml").touch()
    for name in SYSTEM_TOOLS:
        if found := shutil.which(name):
            (made.tools / name).symlink_to(found)
    made.env = {"PATH": str(made.tools), "HOME": str(tmp_path)}
    return made


def wait_for(condition: Callable[[], bool], what: str, timeout_seconds: float = 60) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout_seconds} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_reach_the_trainer_exactly(checkout):
    checkout.install()
    overrides = [
        "data.sources=[{path='my clips'}]",
        "run.name=$(touch pwned)`touch pwned`",
        'text.prompt="穿汉服的女孩在樱花树下起舞 *  ; touch pwned"',
        "run.note=line one\nline two\\",
        "run.empty=",
    ]
    result = checkout.run("configs/pocket.toml", *overrides)
    assert result.returncode == 0, result.stderr
    assert [call["argv"] for call in checkout.calls()] == [
        ["-m", "train", "--config", "configs/pocket.toml", *overrides]
    ]
    assert not list(checkout.root.parent.rglob("pwned"))


@pytest.mark.parametrize("arguments", [(), ("train.steps=3",)])
def test_without_a_configuration_the_pocket_model_is_trained(checkout, arguments):
    checkout.install()
    assert checkout.run(*arguments).returncode == 0
    assert checkout.calls()[0]["argv"] == ["-m", "train", "--config", "configs/pocket.toml", *arguments]


def test_a_configuration_is_looked_up_where_the_user_is(checkout, tmp_path):
    checkout.install()
    elsewhere = tmp_path / "my configs"
    elsewhere.mkdir()
    (elsewhere / "brand=x.toml").touch()
    result = checkout.run("brand=x.toml", cwd=elsewhere)
    assert result.returncode == 0  # an override by its form: brand=...
    result = checkout.run("./brand=x.toml", "a.b=1", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    assert checkout.calls()[-1]["argv"][3:] == [f"{elsewhere}/./brand=x.toml", "a.b=1"]


@pytest.mark.parametrize("argument", ["configs/poket.toml", "--stpes"])
def test_a_wrong_first_argument_stops_before_anything_is_installed(checkout, argument):
    result = checkout.run(argument)
    assert result.returncode == 2
    assert argument in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_the_whole_suite_runs_on_every_core_a_file_at_a_time(checkout):
    checkout.install()
    write_script(checkout.tools / "chromium", "#!/bin/sh\n")
    assert checkout.run("test").returncode == 0
    (call,) = checkout.calls()
    assert call["argv"][:2] == ["-m", "pytest"] and call["argv"][-2:] == ["--dist", "loadfile"]


def test_test_hands_its_arguments_to_pytest(checkout):
    checkout.install()
    write_script(checkout.tools / "chromium", "#!/bin/sh\n")
    assert checkout.run("test", "-k", "a and b").returncode == 0
    assert [call["argv"] for call in checkout.calls()] == [["-m", "pytest", "-k", "a and b"]]


def test_help_installs_nothing(checkout):
    result = checkout.run("--help")
    assert result.returncode == 0
    assert "section.key=value" in result.stdout
    assert not (checkout.root / ".venv").exists()


# --- the environment that the trainer gets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [(0, None, "cpu"), (1, None, "gpu"), (2, "1", "gpu"), (2, "", "cpu"), (2, "-1", "cpu")],
)
def test_one_process_gets_what_accelerate_launch_would_set(checkout, gpus, visible, expected):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    checkout.install()
    if gpus:
        lines = "".join(f"echo 'GPU {index}: NVIDIA (UUID: x)'\n" for index in range(gpus))
        write_script(checkout.tools / "nvidia-smi", f"#!/bin/sh\n{lines}")
    if visible is not None:
        checkout.env["CUDA_VISIBLE_DEVICES"] = visible
    assert checkout.run().returncode == 0

    flags = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags += ["--cpu"] if expected == "cpu" else []
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags, "-m", "train"]))
    _, theirs = prepare_simple_launcher_cmd_env(args)
    (call,) = checkout.calls()
    assert {k: v for k, v in call["env"].items() if k.startswith("ACCELERATE_")} == {
        k: v for k, v in theirs.items() if k.startswith("ACCELERATE_")
    }


def test_several_gpus_are_used_through_accelerate_launch(checkout):
    checkout.install()
    write_script(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\necho '  MIG 1g'\necho 'GPU 1: x'\n")
    assert checkout.run("configs/pocket.toml", "a.b=[1, 2]").returncode == 0
    (call,) = checkout.calls()
    assert call["argv"][:3] == [".venv/bin/accelerate", "launch", "--multi_gpu"]
    assert call["argv"][call["argv"].index("--num_processes") + 1] == "2"
    assert call["argv"][-5:] == ["-m", "train", "--config", "configs/pocket.toml", "a.b=[1, 2]"]


def test_an_accelerate_configuration_names_the_engine_for_this_machines_gpus(checkout):
    checkout.install()
    (checkout.root / "x y.yaml").touch()
    checkout.env["ACCELERATE_CONFIG"] = "x y.yaml"
    result = checkout.run("configs/pocket.toml", "a.b=1")
    assert result.returncode == 2 and "is for GPUs" in result.stderr
    write_script(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    assert checkout.run("configs/pocket.toml", "a.b=1").returncode == 0
    (call,) = checkout.calls()
    assert call["argv"][:4] == [".venv/bin/accelerate", "launch", "--config_file", "x y.yaml"]
    assert call["argv"][4:8] == ["--num_processes", "2", "--num_machines", "1"]
    assert call["argv"][8:] == ["-m", "train", "--config", "configs/pocket.toml", "a.b=1"]
    checkout.env["ACCELERATE_CONFIG"] = "nowhere.yaml"
    result = checkout.run()
    assert result.returncode == 2 and "nowhere.yaml" in result.stderr


# --- refusals and installation ---------------------------------------------------------------------------------------


def test_a_wrong_python_is_refused_with_what_was_found(checkout):
    # Answers the version question as 3.9 would, and names itself.
    fake = "#!/bin/sh\ncase $2 in *print*) echo 3.9 ;; *) exit 1 ;; esac\n"
    write_script(checkout.tools / "python3", fake)
    result = checkout.run()
    assert result.returncode == 2
    assert "3.11" in result.stderr and "python3 is 3.9" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (checkout.root / ".venv").exists()


def test_too_little_disk_is_refused_with_need_and_free(checkout):
    checkout.fake_python(checkout.tools / "python3")
    checkout.fake_df(free_kib=2**20)
    result = checkout.run()
    assert result.returncode == 2
    assert "4 GiB" in result.stderr and "1024 MiB free" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert checkout.calls() == []


@pytest.fixture
def installer(checkout: Checkout) -> Checkout:
    """A checkout with a Python whose `-m venv` makes a fake interpreter: every pip call succeeds and is noted."""
    inner = checkout.root.parent / "inner-python"
    checkout.fake_python(inner)
    write_python_script(checkout.tools / "python3", FAKE_SYSTEM_PYTHON.format(python=sys.executable, inner=str(inner)))
    checkout.fake_df(free_kib=99_999_999)
    return checkout


def pip_targets(checkout: Checkout) -> list[str]:
    return [call["argv"][-1] for call in checkout.calls() if call["argv"][:3] == ["-m", "pip", "install"]]


def test_the_second_run_installs_nothing(installer):
    assert installer.run().returncode == 0
    assert pip_targets(installer) == ["torch", ".[train]"]
    before = len(installer.calls())
    result = installer.run()
    assert [call["argv"][:2] for call in installer.calls()[before:]] == [["-m", "train"]]
    assert "installing" not in result.stderr


def test_a_changed_dependency_and_a_moved_checkout_install_again(installer):
    assert installer.run().returncode == 0
    with (installer.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert installer.run().returncode == 0
    assert len(pip_targets(installer)) == 4
    installer.root = installer.root.rename(installer.root.with_name("moved"))
    assert installer.run().returncode == 0
    assert len(pip_targets(installer)) == 6


def test_the_tests_environment_is_one_to_train_in(installer):
    assert installer.run("test").returncode == 0
    assert pip_targets(installer) == ["torch", ".[train,test]"]
    assert installer.run().returncode == 0
    assert len(pip_targets(installer)) == 2


def test_two_first_runs_at_once_install_once(installer):
    runs = [installer.start() for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert pip_targets(installer) == ["torch", ".[train]"]


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL"])
def test_an_interrupted_installation_is_repaired_by_the_next_run(installer, signal_name):
    inner = installer.root.parent / "inner-python"
    installer.fake_python(inner, hang_in_pip=True)
    started = installer.start()
    pid_file = installer.root / "pip-pid"
    wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()), "pip")
    started.send_signal(getattr(signal, signal_name))
    code = started.wait(timeout=15)
    pip_pid = int(pid_file.read_text())
    if signal_name == "SIGKILL":
        os.kill(pip_pid, signal.SIGKILL)  # nobody was left to stop it; its lock goes with it
    else:
        assert code == 128 + getattr(signal, signal_name)
        assert not alive(pip_pid)

    installer.fake_python(inner)
    (installer.root / ".venv" / "half-written").touch()
    assert installer.run().returncode == 0
    assert not (installer.root / ".venv" / "half-written").exists()  # made anew
    assert installer.calls()[-1]["argv"][:2] == ["-m", "train"]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_the_trainer_and_its_status_comes_back(checkout, name):
    checkout.install(record_only=False)
    write_script(checkout.root / "train" / "__main__.py", FAKE_TRAINER)
    started = checkout.start()
    ready = checkout.root / "ready-0"
    wait_for(lambda: ready.exists() and bool(ready.read_text()), "trainer")
    assert int(ready.read_text()) == started.pid  # no process in between to orphan it
    started.send_signal(getattr(signal, name))
    assert started.wait(timeout=15) == 143
    assert (checkout.root / "saved-0").read_text() == name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_reaches_every_rank_and_none_is_orphaned(checkout, name):
    # accelerate's own launcher and torchrun's agent, for real; only the cards are made up.
    checkout.install(record_only=False)
    shutil.copy(Path(sys.executable).parent / "accelerate", checkout.root / ".venv" / "bin" / "accelerate")
    write_script(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n")
    write_script(checkout.root / "train" / "__main__.py", FAKE_TRAINER)
    started = checkout.start()
    ready = [checkout.root / f"ready-{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in ready), "ranks", 120)
    started.send_signal(getattr(signal, name))
    time.sleep(0.1)
    started.send_signal(getattr(signal, name))  # an impatient second one must not cut the saving short
    assert started.wait(timeout=30) == 143
    assert [(checkout.root / f"saved-{rank}").read_text() for rank in range(2)] == [name] * 2
    assert not any(alive(int(path.read_text())) for path in ready)


def test_the_trainers_failure_is_the_commands_failure(checkout):
    checkout.install(record_only=False)
    write_script(checkout.root / "train" / "__main__.py", "raise SystemExit(7)\n")
    assert checkout.run().returncode == 7
