"""Footage is split where it is cut, to the frame, and nowhere else."""

import itertools
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from data import shots
from data.shots import find_cuts, find_shots
from tests.footage import (
    BIKES_CUTS,
    dimmed,
    encoded,
    footage,
    footage_path,
    grain,
    pan,
    texture,
)
from wan_finetune.pocket import world
from wan_finetune.video import frame_indices, probe, read_frames, write_video


def joined(lengths, **size):
    """Shots of different scenes, each a camera that moves, and the frame numbers at which they are cut."""
    frames = np.concatenate([pan(seed, length, **size) for seed, length in enumerate(lengths)])
    return frames, list(itertools.accumulate(lengths))[:-1]


@pytest.mark.parametrize("fps", [24, 25, 30000 / 1001, 60])
def test_hard_cuts_are_found_at_their_frame(fps, tmp_path):
    lengths = (40, 33, 61, 31)
    frames, cuts = joined(lengths, width=160, height=90)
    write_video(tmp_path / "clip.mp4", frames, fps, crf=26)
    info = probe(tmp_path / "clip.mp4")
    edges = [0.0, *info.pts_seconds[cuts], info.duration_seconds]
    assert find_shots(info) == list(itertools.pairwise(edges))


def test_a_window_inside_a_shot_shows_that_shot_alone(tmp_path):
    frames, cuts = joined((30, 30), width=160, height=90)
    write_video(tmp_path / "clip.mp4", frames, 25)
    info = probe(tmp_path / "clip.mp4")
    (_, end), (start, _) = find_shots(info)
    assert frame_indices(info, start_seconds=end - 1 / 16 - 1e-4, num_frames=1, fps=16)[0] == cuts[0] - 2
    assert frame_indices(info, start_seconds=start, num_frames=1, fps=16)[0] == cuts[0]


def test_real_footage_is_cut_where_the_eye_sees_it():
    info = probe(footage_path("bikes.mp4"))
    edges = [0.0, *(float(info.pts_seconds[cut]) for cut in BIKES_CUTS)]
    # The last shot, of 8 frames, is shorter than half a second.
    assert find_shots(info) == list(itertools.pairwise(edges))
    info = probe(footage_path("bigbuckbunny.mp4"))
    assert find_shots(info) == [(0.0, info.duration_seconds)]


@pytest.mark.parametrize("step", [1, 4, 10])
def test_a_continuous_pan_is_not_cut(step):
    assert find_cuts(iter(pan(1, 40, step=step))) == []
    picture = footage("bigbuckbunny.mp4")[0]
    assert find_cuts(picture[:, step * k : step * k + 320] for k in range(30)) == []


def test_fades_grain_and_the_pocket_world_are_not_cut():
    frames = pan(2, 30)
    assert find_cuts(np.concatenate([dimmed(frames[k : k + 1], 1 - k / 30) for k in range(30)])) == []
    for motion in world.MOTIONS:
        scene = world.Scene(colour="red", shape="square", background="meadow", motion=motion)
        assert find_cuts(iter(world.render(scene, 33))) == []


@pytest.mark.parametrize("gain", [0.2, 0.05])
@pytest.mark.parametrize("deviation", [6, 12])
def test_grain_in_dark_footage_is_no_cut(gain, deviation, tmp_path):
    # Its hue is another one in each frame, which is what the detector's default takes for a cut.
    still = np.repeat(footage("bikes.mp4")[5:6], 8, axis=0)
    frames = grain(dimmed(still, gain), deviation)
    assert find_cuts(iter(frames)) == []
    assert find_cuts(iter(encoded(frames, tmp_path, crf=20))) == []


def test_cuts_in_dim_and_grainy_footage_are_found():
    scenes = [footage("bikes.mp4")[k] for k in (0, 3, 5, 8, 11)]
    frames = np.concatenate([np.repeat(scene[None], 4, axis=0) for scene in scenes])
    assert find_cuts(iter(grain(dimmed(frames, 0.4), 6))) == [4, 8, 12, 16]


@pytest.mark.parametrize(("num_frames", "is_shot"), [(12, False), (13, True)])
def test_half_a_second_makes_a_shot(num_frames, is_shot, tmp_path):
    frames, cuts = joined((30, num_frames, 30), width=160, height=90)
    write_video(tmp_path / "clip.mp4", frames, 25)
    found = find_shots(probe(tmp_path / "clip.mp4"))
    pieces = [(0.0, cuts[0] / 25), (cuts[0] / 25, cuts[1] / 25), (cuts[1] / 25, len(frames) / 25)]
    assert np.allclose(found, pieces if is_shot else [pieces[0], pieces[2]])


def test_where_all_is_short_the_longest_piece_is_the_shot(tmp_path):
    frames = np.concatenate([np.repeat(texture(seed, 160, 90)[None], 4 + (seed == 3), axis=0) for seed in range(6)])
    write_video(tmp_path / "clip.mp4", frames, 25)
    assert np.allclose(find_shots(probe(tmp_path / "clip.mp4")), [(12 / 25, 17 / 25)])


def test_times_of_a_variable_rate_are_kept(tmp_path):
    frames, cuts = joined((30, 30), width=160, height=90)
    gaps = np.random.default_rng(0).integers(20, 60, len(frames))
    stamps = np.concatenate([[0], np.cumsum(gaps)[:-1]])
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe(tmp_path / "clip.mkv")
    assert np.allclose(find_shots(info)[1][0], stamps[cuts[0]] / 1000, atol=0.002)


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_reading_in_pieces_changes_nothing(most, tmp_path, monkeypatch):
    frames, _ = joined((30, 30), width=160, height=90)
    write_video(tmp_path / "clip.mp4", frames, 25)
    info = probe(tmp_path / "clip.mp4")
    expected = find_shots(info)
    monkeypatch.setattr(shots, "CHUNK_BYTES", most * 160 * 90 * 3)
    asked = []

    def read(info, indices):
        asked.append(indices)
        return read_frames(info, indices)

    assert find_shots(info, read) == expected
    assert np.array_equal(np.concatenate(asked), np.arange(60))
    assert all(len(indices) <= most for indices in asked)


def test_pieces_end_before_key_frames_where_they_can(monkeypatch):
    info = SimpleNamespace(width=10, height=10, num_frames=25, key_frames=np.array([0, 8, 12]))
    monkeypatch.setattr(shots, "CHUNK_BYTES", 300 * 10)
    assert [(int(part[0]), int(part[-1])) for part in shots.chunks(info)] == [(0, 7), (8, 11), (12, 21), (22, 24)]
    info = SimpleNamespace(width=4096, height=4096, num_frames=2, key_frames=None)
    assert [part.tolist() for part in shots.chunks(info)] == [[0], [1]]
