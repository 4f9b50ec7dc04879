"""The decoding process and its parent: it ends with it, leaves no trace of itself, and is never shared by a fork."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.process_facts import is_running, wait_until
from tests.video_material import encode_drift, long_single_gop
from wan_finetune.video import probe, read_frames

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode_drift(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory):
    """A clip that takes much longer to inspect than others."""
    return long_single_gop(tmp_path_factory.mktemp("slow") / "slow.mp4", num_frames=9000)


SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
from wan_finetune import decoding
from wan_finetune.decoding import Decoder

clip, slow, how = sys.argv[1:]
decoder = Decoder()
info = decoder.inspect(Path(clip))
print(decoder.pid, flush=True)
if how == "fork":
    before = decoder.read(info, np.arange(5))
    del before  # its memory is now free to be used again, by one of the two
    ready, go = os.pipe()
    if os.fork() == 0:
        os.read(ready, 1)
        print("fork", decoder.read(info, np.array([30])).sum(), decoder.pid, flush=True)
        decoder.close()
        os._exit(0)
    frames = decoder.read(info, np.array([3]))
    os.write(go, b"x")
    assert os.wait()[1] == 0
    print("parent", frames.sum(), decoder.pid, flush=True)
while how != "fork":
    decoder.inspect(Path(slow if how == "busy" else clip))
    if how != "busy":
        sys.stdin.read()
"""


def start_script(clip, slow_clip, how):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(clip), str(slow_clip), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        process_group=0,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("how", ["busy", "idle", "stuck"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_dies_with_its_parent(clip, slow_clip, how, number):
    process, child = start_script(clip, slow_clip, how)
    time.sleep(0.2)
    assert is_running(child)
    if how == "stuck":
        os.kill(child, signal.SIGSTOP)  # it will not see that its parent is gone
    process.send_signal(number)
    assert process.wait(10) == -number
    assert wait_until(lambda: not is_running(child), 5)
    process.communicate()


def test_an_interrupt_ends_parent_and_child_with_one_traceback(clip, slow_clip):
    process, child = start_script(clip, slow_clip, "busy")
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the whole group
    _, errors = process.communicate(timeout=20)
    assert errors.count("Traceback") == 1 and errors.strip().endswith("KeyboardInterrupt")
    assert not is_running(child)


def test_after_a_fork_each_process_has_a_child_of_its_own(clip, slow_clip):
    process, child = start_script(clip, slow_clip, "fork")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    sums, pids = {}, {}
    for who, total, pid in map(str.split, output.splitlines()):
        sums[who], pids[who] = int(total), int(pid)
    assert pids["parent"] == child != pids["fork"]
    frames = read_frames(probe(clip), np.array([3, 30]))
    assert sums == {"parent": frames[0].sum(), "fork": frames[1].sum()}
