"""`python -m train.precompute` in several processes: the work is shared, and each clip is encoded once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_material import add_clip

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import hashlib, os, sys
from train import precompute
from wan_finetune.encoders import TextEncoder, VideoEncoder

def noted(encode, name):
    def encode_and_note(self, what):
        content = what.encode() if isinstance(what, str) else what.tobytes()
        with open("made", "ab", 0) as file:
            file.write(f"{name} {hashlib.sha256(content).hexdigest()} {os.environ['RANK']}\\n".encode())
        return encode(self, what)
    return encode_and_note

VideoEncoder.__call__ = noted(VideoEncoder.__call__, "clip")
TextEncoder.__call__ = noted(TextEncoder.__call__, "caption")
sys.exit(precompute.main())
"""


def precompute(folder, processes):
    """The command in so many processes, as a launcher starts them; what was encoded, by which of them."""
    (folder / "made").unlink(missing_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    settings = [
        f"data.sources=[{{path='{folder / 'clips'}'}}]",
        f"data.cache='{folder / 'cache'}'",
        f"run.folder='{folder / 'runs'}'",
        "data.buckets=['64x64x9']",
    ]
    done = subprocess.run(
        [*command, "script.py", "--config", str(ROOT / "configs" / "pocket.toml"), *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in (folder / "made").read_text().splitlines()] if (folder / "made").exists() else []


@pytest.mark.slow
def test_two_processes_share_the_work_and_encode_each_clip_once(tmp_path):
    for number in range(24):
        add_clip(tmp_path / "clips", f"{number:02d}.mp4", f"a grey wall, number {number}", seed=3 * number)
    made = precompute(tmp_path, 2)
    clips = [content for name, content, _ in made if name == "clip"]
    captions = [content for name, content, _ in made if name == "caption"]
    assert (len(clips), len(set(clips)), len(captions), len(set(captions))) == (24, 24, 25, 25)
    assert {rank for _, _, rank in made} == {"0", "1"}, "one did it all"
    assert len(list((tmp_path / "cache" / "latent").rglob("*.safetensors"))) == 24
    assert precompute(tmp_path, 1) == []
