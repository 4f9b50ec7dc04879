"""Thousands of files and decodes: none of them ends, stops or fattens either process."""

import gc
import os
import time

import numpy as np
import pytest

from tests.process_facts import descriptors, resident_bytes
from tests.video_material import encode_drift, mutated, mutation_seeds, real_footage
from wan_finetune.decoding import Decoder
from wan_finetune.video import VideoFault


def check_mutations(folder, num_clips, seed):
    """Inspect and read clips with random faults: each gives frames or a fault, in time. How many gave frames."""
    seeds = [(path.suffix, path.read_bytes()) for path in mutation_seeds(folder / "seeds")]
    timeout_seconds, whole = 10.0, 0
    with Decoder(timeout_seconds=timeout_seconds) as decoder:
        decoder.inspect(next((folder / "seeds").iterdir()))
        for number in range(num_clips):
            suffix, content = seeds[number % len(seeds)]
            path = folder / f"clip{suffix}"
            path.write_bytes(mutated(content, np.random.default_rng([seed, number])))
            start = time.monotonic()
            try:
                info = decoder.inspect(path)
                assert time.monotonic() - start < timeout_seconds + 2
                start = time.monotonic()
                wanted = np.unique(np.linspace(0, info.num_frames - 1, 9).astype(int))
                assert decoder.read(info, wanted).shape == (len(wanted), info.height, info.width, 3)
                whole += 1
            except VideoFault as fault:
                assert "; " in fault.reason and str(path) not in fault.reason, fault
            assert time.monotonic() - start < timeout_seconds + 2, f"mutation {number} of seed {seed}"
    return whole


def test_60_mutated_clips_give_frames_or_a_fault_in_time(tmp_path):
    assert 5 <= check_mutations(tmp_path, 60, seed=0) <= 55


@pytest.mark.slow
def test_2000_mutated_clips_give_frames_or_a_fault_in_time(tmp_path):
    assert 200 <= check_mutations(tmp_path, 2000, seed=1) <= 1800


def check_soak(folder, num_decodes, clips):
    """Decode again and again: neither process may grow by 20 MiB or keep a descriptor."""
    with Decoder() as decoder:
        infos = [decoder.inspect(path) for path in clips]

        def decode(number):
            info = infos[number % len(infos)]
            first = number * 7 % (info.num_frames - 9)
            assert decoder.read(info, np.arange(first, first + 9)).shape[0] == 9

        for number in range(10 * len(infos)):
            decode(number)
        gc.collect()
        pids = (os.getpid(), decoder.pid)
        before = [(resident_bytes(pid), descriptors(pid)) for pid in pids]
        for number in range(num_decodes):
            decode(number)
        gc.collect()
        assert decoder.pid == pids[1]
        for pid, (bytes_before, descriptors_before) in zip(pids, before, strict=True):
            assert resident_bytes(pid) - bytes_before <= 20 * 2**20
            assert descriptors(pid) - descriptors_before <= 1


def test_200_decodes_leave_nothing_behind(tmp_path):
    avi = encode_drift(tmp_path / "a.avi", codec="mpeg4", options={"bf": "2", "qscale": "3"})
    check_soak(tmp_path, 200, [encode_drift(tmp_path / "a.mp4"), avi])


@pytest.mark.slow
def test_1500_decodes_leave_nothing_behind(tmp_path):
    check_soak(tmp_path, 1500, [*mutation_seeds(tmp_path / "seeds"), real_footage("bikes.mp4")])
