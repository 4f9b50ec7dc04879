"""Decoding in a child process: the same answers, and no file that hangs or kills the parent."""

import gc
import os
import signal
import threading
import time
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.process_facts import descriptors, is_running, wait_until
from tests.video_material import encode_drift, long_single_gop, real_footage
from wan_finetune import decoding
from wan_finetune.decoding import Decoder
from wan_finetune.video import VideoFault, VideoInfo, probe, read_frames


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout_seconds=20) as decoder:
        yield decoder


def children():
    """Processes that this one has started."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode_drift(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory):
    """A clip that takes much longer to inspect than others."""
    return long_single_gop(tmp_path_factory.mktemp("slow") / "slow.mp4", num_frames=9000)


def test_the_child_gives_what_the_library_gives(decoder, clip, tmp_path):
    still = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(still)
    avi = encode_drift(tmp_path / "a.avi", codec="mpeg4", options={"bf": "2", "qscale": "3"})
    for path, indices in (
        (clip, [5, 0, 39, 5]),
        (avi, [3, 30]),
        (still, [0]),
        (real_footage("bikes.mp4"), [100, 7, 8]),
    ):
        info, expected = decoder.inspect(path), probe(path)
        for field in fields(VideoInfo):
            np.testing.assert_array_equal(getattr(info, field.name), getattr(expected, field.name), field.name)
        frames = decoder.read(info, np.array(indices))
        np.testing.assert_array_equal(frames, read_frames(expected, np.array(indices)))
        frames += 1  # the caller's own: neither read-only nor seen by anyone else
        np.testing.assert_array_equal(decoder.read(info, np.array(indices)), read_frames(expected, np.array(indices)))


def test_a_child_that_was_begun_early_is_the_one_that_answers(clip):
    others = children()

    def started():
        return [pid for pid in children() if pid not in others]

    with Decoder() as decoder:
        decoder.begin()
        decoder.begin()
        (begun,) = started()
        assert decoder.pid is None
        assert decoder.inspect(clip).num_frames == 40 and decoder.pid == begun
        decoder.begin()
        assert started() == [begun]
    assert started() == []
    decoder.begin()
    (begun,) = started()
    os.kill(begun, signal.SIGKILL)
    assert wait_until(lambda: not is_running(begun))
    assert decoder.inspect(clip).num_frames == 40 and decoder.pid != begun
    decoder.close()
    decoder.begin()
    decoder.close()
    assert started() == []


def test_frames_in_use_are_never_overwritten(decoder, clip):
    info = decoder.inspect(clip)
    every = read_frames(info, np.arange(40))
    held = {}
    for number in range(30):
        frames = decoder.read(info, np.arange(number, number + 5))
        # A view is kept of some, all of others, and of some nothing, so that memory is given back and used again.
        if number % 3 < 2:
            held[number] = frames[2:3, ::2] if number % 3 else frames
        del frames
    for number, frames in held.items():
        expected = every[number : number + 5]
        np.testing.assert_array_equal(frames, expected[2:3, ::2] if number % 3 else expected)


def test_faults_of_a_file_come_through_word_for_word(decoder, tmp_path, clip):
    missing, text = tmp_path / "missing.mp4", tmp_path / "text.mp4"
    text.write_text("not a film")
    fifo = tmp_path / "fifo.mp4"
    os.mkfifo(fifo)
    for path, lasting in ((missing, False), (text, True), (fifo, False)):
        with pytest.raises(VideoFault) as expected:
            probe(path)
        with pytest.raises(VideoFault) as caught:
            decoder.inspect(path)
        assert str(caught.value) == str(expected.value)
        assert caught.value.lasting is expected.value.lasting is lasting
    with pytest.raises(VideoFault, match=r"frame indices must be in 0\.\.39"):
        decoder.read(decoder.inspect(clip), np.array([40]))
    with pytest.raises(VideoFault, match=r"frame indices must be in 0\.\.39, got \[\]"):
        decoder.read(decoder.inspect(clip), np.array([]))


def test_flipped_bits_are_found_where_decord_conceals_them(decoder, tmp_path, clip):
    with av.open(str(clip)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    content = bytearray(clip.read_bytes())
    for place in range(packet.pos + packet.size // 2, packet.pos + packet.size, 7):
        content[place] ^= 0x55
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    info = decoder.inspect(damaged)
    assert info.reader == "decord"
    assert (read_frames(info, np.arange(40)) != read_frames(probe(clip), np.arange(40))).any()  # without a word
    with pytest.raises(VideoFault, match=r"damaged\.mp4: \d+ frames cannot be decoded, the first.*export it again"):
        decoder.read(info, np.arange(40))


def test_a_child_that_does_not_answer_is_replaced_in_time(clip):
    with Decoder(timeout_seconds=1) as decoder:
        info = decoder.inspect(clip)
        stopped = decoder.pid
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(VideoFault, match=r"kept the decoder busy for more than 1 s; export.*allow more") as caught:
            decoder.read(info, np.array([0]))
        assert time.monotonic() - start < 3
        assert not caught.value.lasting and not is_running(stopped)
        assert decoder.read(info, np.array([0])).shape == (1, 96, 128, 3)
        assert decoder.pid != stopped


def test_a_file_that_takes_too_long_is_a_fault_in_time(slow_clip):
    with Decoder(timeout_seconds=0.02) as decoder:
        start = time.monotonic()
        with pytest.raises(VideoFault, match=r"kept the decoder busy for more than 0\.02 s"):
            decoder.inspect(slow_clip)
    # Starting the child is no part of what the file is given.
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_names_the_file_and_the_next_file_is_read(decoder, clip, number):
    info = decoder.inspect(clip)
    crashed = decoder.pid
    os.kill(crashed, signal.SIGSTOP)
    # The signal waits until the child, by then busy with the question, goes on.
    killer = threading.Timer(0.3, lambda: (os.kill(crashed, number), os.kill(crashed, signal.SIGCONT)))
    killer.start()
    with pytest.raises(VideoFault, match=rf"clip\.mp4: its decoder crashed on it \({number.name}\); export it again"):
        decoder.read(info, np.array([0]))
    killer.join()
    np.testing.assert_array_equal(decoder.read(info, np.array([9])), read_frames(info, np.array([9])))
    assert decoder.pid != crashed


def test_a_child_that_died_between_two_questions_is_replaced_in_silence(decoder, clip):
    info = decoder.inspect(clip)
    for number in (signal.SIGKILL, signal.SIGSEGV):
        died = decoder.pid
        os.kill(died, number)
        assert wait_until(lambda died=died: not is_running(died))
        assert decoder.read(info, np.array([0])).shape == (1, 96, 128, 3)


def test_a_child_is_replaced_before_what_its_libraries_lose_adds_up(clip, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_QUESTIONS", 3)
    with Decoder() as decoder:
        pids = [decoder.inspect(clip) and decoder.pid for _ in range(7)]
    assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 3, 6]


def test_what_kills_a_child_from_outside_is_not_laid_to_the_file_at_once(decoder, clip):
    info = decoder.inspect(clip)
    os.kill(decoder.pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (decoder.pid, signal.SIGKILL))
    killer.start()
    assert decoder.read(info, np.array([0])).shape == (1, 96, 128, 3)
    killer.join()


def test_a_child_killed_again_and_again_is_a_fault(decoder, slow_clip):
    decoder.inspect(real_footage("carphone_pristine.mp4"))
    done = threading.Event()

    def kill_each_child():
        while not done.wait(0.01):
            if decoder.pid is not None:
                os.kill(decoder.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_each_child)
    killer.start()
    try:
        with pytest.raises(VideoFault, match="killed twice, most likely for want of memory; scale it down"):
            decoder.inspect(slow_clip)
    finally:
        done.set()
        killer.join()


def test_memory_has_a_limit(clip):
    frame_bytes = 128 * 96 * 3
    with Decoder(memory_bytes=2**30) as decoder:
        info = decoder.inspect(clip)
        with pytest.raises(VideoFault, match=r"29128 frames of 128x96 are 1\.0 GiB, and 1 GiB are the limit; scale it"):
            decoder.read(info, np.zeros(2**30 // frame_bytes + 1, np.int64))
        # It would fit alone, but not beside the libraries.
        with pytest.raises(VideoFault, match="needs more than 1 GiB of memory to decode; scale it down") as caught:
            decoder.read(info, np.zeros(2**30 // frame_bytes, np.int64))
        assert not caught.value.lasting
        assert decoder.read(info, np.zeros(1, np.int64)).shape == (1, 96, 128, 3)
    with pytest.raises(ValueError, match="at least 1 GiB"):
        Decoder(memory_bytes=10)


def test_the_child_is_light_and_has_nothing_of_the_parent(decoder, clip):
    import torch

    torch.set_num_threads(1)
    decoder.inspect(clip)
    maps = Path(f"/proc/{decoder.pid}/maps").read_text()
    assert "libtorch" in Path("/proc/self/maps").read_text() and "libtorch" not in maps
    limits = Path(f"/proc/{decoder.pid}/limits").read_text()
    assert any(line.split()[:5] == ["Max", "core", "file", "size", "0"] for line in limits.splitlines())
    assert any(line.split()[:4] == ["Max", "address", "space", str(8 * 2**30)] for line in limits.splitlines())
    assert os.getpgid(decoder.pid) == decoder.pid != os.getpgid(0)


def test_signals_that_a_scheduler_sends_to_everybody_do_not_end_the_child(decoder, clip):
    info = decoder.inspect(clip)
    before = decoder.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(before, number)
    assert decoder.read(info, np.array([0])).shape == (1, 96, 128, 3)
    assert decoder.pid == before


def test_threads_share_a_decoder(decoder, clip):
    info = decoder.inspect(clip)
    expected = read_frames(info, np.arange(40))
    wrong = []

    def read_some(first):
        for index in range(first, 40, 4):
            if not np.array_equal(decoder.read(info, np.array([index]))[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read_some, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_close_ends_the_child_and_a_later_question_starts_another(clip):
    decoder = Decoder()
    assert decoder.pid is None
    decoder.inspect(clip)
    first = decoder.pid
    before = descriptors("self")
    decoder.close()
    decoder.close()
    assert not is_running(first) and descriptors("self") < before
    decoder.inspect(clip)
    second = decoder.pid
    del decoder
    gc.collect()
    assert not is_running(second)


def test_an_interrupted_question_leaves_no_stale_answer(decoder, clip):
    """An exception out of a signal handler, as a stop request is, comes while the child is at work."""
    info = decoder.inspect(clip)

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    os.kill(decoder.pid, signal.SIGSTOP)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stop):
            decoder.read(info, np.array([0]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert decoder.inspect(clip).num_frames == info.num_frames == 40


def test_a_child_that_cannot_start_says_why(monkeypatch, tmp_path, clip):
    (tmp_path / "decord.py").write_text("raise ImportError('no decord here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Decoder() as decoder, pytest.raises(RuntimeError, match="does not start: ImportError: no decord here"):
        decoder.inspect(clip)
