"""`python -m data.check`: what a person sees of a data set before training on it."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_material import add_clip
from wan_finetune.pocket import world
from wan_finetune.video import read_video, write_video

ROOT = Path(__file__).resolve().parent.parent


def add_scene(folder, name, number, caption=None):
    """A clip of the pocket world, in colours and motion."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = world.random_scene(np.random.default_rng(number), world.COMBINATIONS[37 * number % len(world.COMBINATIONS)])
    write_video(folder / f"{name}.mp4", world.render(scene, 17), 16)
    (folder / f"{name}.txt").write_text(caption or world.caption(scene), encoding="utf-8")


def checked(folder, tmp_path, *overrides, flags=(), stderr=subprocess.PIPE):
    """The command as a user runs it."""
    config = tmp_path / "config.toml"
    config.write_text(
        f"[run]\nname = 'x'\n[model]\nbase = 'pocket'\n[data]\ntrigger = 'ACME'\nbuckets = ['64x64x17', '64x64x1']\n"
        f"cache = '{tmp_path / 'cache'}'\n[[data.sources]]\npath = '{folder}'\n[high]\nsteps = 3\n"
    )
    command = [sys.executable, "-m", "data.check", "--config", str(config), "--out", str(tmp_path / "out"), *flags]
    return subprocess.run(
        [*command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=120
    )


def test_a_good_set_passes_and_is_there_to_look_at(tmp_path):
    for number in range(4):
        add_scene(tmp_path / "clips", f"{number}", number)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "clips" / "still.png"
    )
    (tmp_path / "clips" / "still.txt").write_text("coloured noise on a board")
    done = checked(tmp_path / "clips", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64x64x17: 4 clips, 4 windows, 80 tokens each" in done.stdout
    assert "64x64x1: 1 clips, 1 windows, 16 tokens each" in done.stdout
    assert "5 clips can be used, 0 cannot" in done.stdout and "error" not in done.stdout
    assert done.stderr == "", "no progress bar where nobody watches"
    out = tmp_path / "out"
    clips = sorted((out / "clips").iterdir())
    assert len(clips) == 4
    frames, fps = read_video(clips[0])
    assert frames.shape == (17, 64, 64, 3) and fps == 16
    with Image.open(out / "sheets" / "000.png") as sheet:
        assert sheet.size == (6 * 64, 64)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 * 3 + 1 and "ACME, " in page and str(tmp_path) not in page
    assert len((out / "data_report.jsonl").read_text().splitlines()) == 5


def test_what_cannot_be_used_is_exit_1_and_every_doubt_is_named(tmp_path):
    folder = tmp_path / "clips"
    for number in range(3):
        add_scene(folder, f"{number}", number)
    add_scene(folder, "again", 0, "the very same scene under another name")
    add_clip(folder, "short.mp4", "too short for the bucket", num_frames=4)
    write_video(folder / "black.mp4", np.zeros((30, 64, 64, 3), np.uint8), 16)
    (folder / "black.txt").write_text("nothing to be seen here")
    frozen = np.random.default_rng(1).integers(0, 255, (1, 8, 8, 3), dtype=np.uint8)
    write_video(folder / "frozen.mp4", frozen.repeat(30, 0).repeat(8, 1).repeat(8, 2), 16)
    (folder / "frozen.txt").write_text("a patchwork of colours in ACME style, ACME")
    patches = np.random.default_rng(2).integers(60, 255, (2, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    cut = [np.roll(patch, frame, axis=1) for patch in patches for frame in range(30)]
    write_video(folder / "cut.mp4", np.stack(cut), 16)
    (folder / "cut.txt").write_text("coloured patches that move")
    done = checked(folder, tmp_path, "data.buckets=['64x64x17']", flags=["--json"])
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    reasons = {row["file"]: row["reason"] for row in told["clips"] if not row["used"]}
    assert list(reasons) == ["short.mp4"] and "too short" in reasons["short.mp4"]
    assert told["unusable"] == 1
    (bucket,) = told["buckets"]
    assert bucket == {"name": "64x64x17", "clips": 7, "samples": 7, "tokens": 5 * 4 * 4}
    findings = {(clip, message) for _, clip, message in told["findings"]}

    def said(clip, words):
        return any(clip == name and words in message for name, message in findings)

    assert said("black.mp4", "is black throughout") and said("frozen.mp4", "does not move")
    assert said("cut.mp4", "holds 2 shots, and a window may run across a cut")
    assert said("0.mp4", "shows the same as again.mp4; keep one of them")
    assert not any(clip == "cut.mp4" and "black bars" in message for clip, message in findings)
    assert any(name == "frozen.mp4" and "ACME" in message for name, message in findings)  # the trigger twice


def letterboxed(frames):
    """The frames between black bars."""
    frames = frames.copy()
    frames[:, :10] = frames[:, -10:] = 0
    return frames


def test_sources_are_told_apart_and_what_they_disagree_on_is_named(tmp_path):
    look, stock, again = tmp_path / "look", tmp_path / "stock", tmp_path / "again"
    add_scene(look, "a", 1)
    add_scene(look, "b", 2)
    patches = np.random.default_rng(3).integers(80, 255, (8, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    moving = letterboxed(np.stack([np.roll(patches, 2 * frame, axis=1)[:, :64] for frame in range(30)]))
    write_video(look / "bars.mp4", moving, 16)
    (look / "bars.txt").write_text("patches of colour that pass by")
    # Then a card, which the cut before it belongs to.
    write_video(look / "card.mp4", np.concatenate([moving[:, :, ::-1], patches[None, :, :64].repeat(30, 0)]), 16)
    (look / "card.txt").write_text("patches of colour that pass by to the left")
    add_clip(look, "brief.mp4", "a short moment of grey", num_frames=8)
    stock.mkdir()
    shutil.copy(look / "a.mp4", stock / "copy.mp4")
    (stock / "copy.txt").write_text("a shape on the ground")
    again.mkdir()
    shutil.copy(look / "b.mp4", again / "b.mp4")
    (again / "b.txt").write_text("an old caption of the same clip")
    others = f"{{path='{stock}', regularisation=true}}, {{path='{again}'}}"
    # The first folder a second time, in another size: no duplicates and no disagreement.
    wide = f"{{path='{look}', buckets=['64x48x17', '64x48x1']}}"
    done = checked(look, tmp_path, f"data.sources=[{{path='{look}'}}, {others}, {wide}]", flags=["--json"])
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)["findings"]
    name = "source 1: look/"
    found = [(level, clip, message.split(";")[0]) for level, clip, message in told]
    assert [one for one in found if one[1] == "stock/copy.mp4"] == [
        (
            "error",
            "stock/copy.mp4",
            f"is the same clip as {name}a.mp4, and only one of the two sources is a regularisation set: it would be "
            "learnt and held off at once",
        )
    ]
    assert ["warning", "again/b.mp4", f"is the same clip as {name}b.mp4, with another caption; keep one, or write both "
            "beside one of them"] in told  # fmt: skip
    assert ("warning", f"{name}bars.mp4", "has black bars, which would be learnt") in found
    assert ("warning", f"{name}card.mp4", "ends in a still picture from 1.88 s on") in found
    assert not [one for one in found if one[1] == f"{name}card.mp4" and "shots" in one[2]]
    still = "is a video that fills no bucket but 64x64x1, and trains as a still, without motion"
    assert ("warning", f"{name}brief.mp4", still) in found
    assert ("warning", f"{name}a.mp4", "shows the same as stock/copy.mp4") in found
    assert not any("has the same caption" in message for _, _, message in found)
    # Only its size is another in the fourth source.
    assert {message for _, clip, message in found if clip.startswith("source 4")} == {still.replace("64x64", "64x48")}


def test_progress_is_shown_on_a_terminal(tmp_path):
    for number in range(3):
        add_scene(tmp_path / "clips", f"{number}", number)
    main, terminal = pty.openpty()
    done = checked(tmp_path / "clips", tmp_path, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(main, "rb", 0) as file:  # the end of a terminal is an error
        while part := file.read(65536):
            shown += part
    assert done.returncode == 0 and "3 clips can be used" in done.stdout
    assert b"looking at the clips" in shown and b"3/3" in shown and "━".encode() in shown


def test_bad_input_is_one_message_and_exit_2(tmp_path):
    done = checked(tmp_path / "absent", tmp_path)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "no such folder" in done.stderr
    done = checked(tmp_path, tmp_path, "data.bukets=1")
    assert done.returncode == 2 and "did you mean buckets?" in done.stderr


def test_check_needs_neither_torch_nor_diffusers(tmp_path):
    add_scene(tmp_path / "clips", "a", 1)
    program = (
        "import sys, runpy\nsys.argv = ['check', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('data.check', run_name='__main__')\n"
        "except SystemExit:\n"
        "    print(sorted({'torch', 'diffusers', 'transformers', 'scipy', 'datasets'} & set(sys.modules)))"
    )
    config = tmp_path / "config.toml"
    config.write_text(
        f"[model]\nbase = 'pocket'\n[data]\nbuckets = ['64x64x17']\ncache = '{tmp_path / 'cache'}'\n"
        f"[[data.sources]]\npath = '{tmp_path / 'clips'}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(config), "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    # --help does not even wait for NumPy.
    program = "import sys, data.check; print(sorted({'numpy', 'pydantic', 'av', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]"], done.stdout + done.stderr


@pytest.mark.browser
def test_the_page_shows_its_pictures_and_asks_nobody(tmp_path, chromium):
    from playwright.sync_api import sync_playwright

    folder = tmp_path / "clips"
    add_scene(folder, "a", 1, "一个<b>红色</b>的圆形")
    add_clip(folder, "short.mp4", "too short", num_frames=4)
    checked(folder, tmp_path, "data.buckets=['64x64x17']")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.goto((tmp_path / "out" / "report.html").as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
        text = page.inner_text("main")
        browser.close()
    assert widths == [64, 64, 64] and not problems
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert "一个<b>红色</b>的圆形" in text and "too short" in text and "1 to mend" in text
