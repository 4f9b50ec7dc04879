"""Processes that share a cache, and die at any moment: no entry is torn or mixed, and hardly any work is done twice."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from data.cache import Cache
from data.claims import shared

# The server imports torch once; every process of these tests is then a fork of it, and starts at once.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.test_cache_races"])
KEY = "ab" * 32


def key_of(number):
    return f"{number * 0x9E3779B97F4A7C15 % 2**256:064x}"


def write_marked(cache, number):
    """An entry that shows whether all of it is of one write, and of this key."""
    mark = random.SystemRandom().random()
    tensors = {"latent": torch.full((16, 3, 8, 8), mark), "std": torch.full((16, 3, 8, 8), mark)}
    cache.write("latent", key_of(number), {**tensors, "number": torch.tensor([float(number)])}, {"mark": str(mark)})


def is_whole(entry, number):
    return bool(
        len(torch.cat([entry["latent"], entry["std"]]).unique()) == 1 and entry["number"].item() == float(number)
    )


def write_all(folder, count, rank, log):
    """A process that fills the cache as precompute does, and replaces an entry now and then."""
    torch.set_num_threads(1)
    cache = Cache(folder / "cache")
    numbers = {key_of(number): number for number in range(count)}

    def make(key):
        with (folder / log).open("ab", buffering=0) as file:
            file.write(f"{os.getpid()} {numbers[key]}\n".encode())
        time.sleep(0.002)
        write_marked(cache, numbers[key])
        if numbers[key] % 4 == 0:
            write_marked(cache, numbers[random.choice(list(cache.keys("latent")))])

    with (folder / "ready").open("ab", buffering=0) as file:
        file.write(b"one more\n")
    while len(lines_of(folder / "ready")) < 4:  # so that they race from the first entry on
        time.sleep(0.001)
    keys = list(numbers)
    first = count * rank // 4
    cache.fill("latent", keys[first:] + keys[:first], make, lambda: None)


def read_all(folder, count):
    """A process that reads what is there, again and again, until it is told to stop."""
    torch.set_num_threads(1)
    cache = Cache(folder / "cache")
    numbers = {key_of(number): number for number in range(count)}
    seen = {"reads": 0, "bad": 0}
    while not (folder / "stop").exists():
        for key in cache.keys("latent"):
            entry = cache.read("latent", key)
            seen["reads"] += 1
            seen["bad"] += entry is None or not is_whole(entry, numbers[key])
    (folder / "seen.json").write_text(json.dumps(seen))


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def start(function, *arguments):
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    return process


def finish(process, seconds=60):
    process.join(seconds)
    assert process.exitcode == 0, process.exitcode


def race(folder, count, kills):
    """Four writers and a reader, with SIGKILLs spread over the work; how many entries were begun, and what was read."""
    reader = start(read_all, folder, count)
    writers = [start(write_all, folder, count, rank, "made") for rank in range(4)]
    rng = random.Random(0)
    for kill in range(kills):
        deadline = time.monotonic() + 60
        while len(lines_of(folder / "made")) < (kill + 1) * count // (kills + 2):
            assert time.monotonic() < deadline, "the writers stand still"
            time.sleep(0.002)
        victim = rng.randrange(4)
        assert writers[victim].exitcode is None, "there was nobody left to kill"
        os.kill(writers[victim].pid, signal.SIGKILL)
        writers[victim].join()
        writers[victim] = start(write_all, folder, count, victim, "made")
    for writer in writers:
        finish(writer)
    (folder / "stop").touch()
    finish(reader)
    return len(lines_of(folder / "made")), json.loads((folder / "seen.json").read_text())


def check_race(folder, count, kills):
    made, seen = race(folder, count, kills)
    cache = Cache(folder / "cache")
    assert cache.keys("latent") == {key_of(number) for number in range(count)}
    assert all(is_whole(cache.read("latent", key_of(number)), number) for number in range(count))
    assert seen["bad"] == 0 and seen["reads"] >= count
    assert count <= made <= count + kills, "only what a killed process was making may be made again"
    assert made <= 1.05 * count


def test_killed_writers_tear_nothing_and_repeat_only_what_they_were_making(tmp_path):
    check_race(tmp_path, count=160, kills=8)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(3))
def test_twenty_kills_tear_nothing_and_repeat_only_what_was_being_made(tmp_path, repeat):
    check_race(tmp_path, count=1000, kills=20)


def test_four_processes_that_begin_at_one_place_make_each_entry_once(tmp_path):
    writers = [start(write_all, tmp_path, 100, 0, "made") for _ in range(4)]
    for writer in writers:
        finish(writer)
    made = [line.split() for line in lines_of(tmp_path / "made")]
    assert sorted(int(number) for _, number in made) == list(range(100))
    assert len({process for process, _ in made}) > 1, "one did it all: nothing was shown"


def hold(folder, key, ready, name):
    cache = Cache(folder)
    with cache.claim("latent", key) as mine:
        ready.put(mine)
        while not (folder / name).exists():
            time.sleep(0.005)


def ask(folder, key, answer):
    with Cache(folder).claim("latent", key) as mine:
        answer.put(mine)


def test_claim_keeps_others_out_until_it_ends_or_its_holder_dies(tmp_path):
    cache, ready = Cache(tmp_path), SPAWN.Queue()
    holders = [start(hold, tmp_path, KEY, ready, "let-go")]
    assert ready.get(timeout=60) is True
    with (
        cache.claim("latent", KEY) as mine,
        cache.claim("text", KEY) as text,
        cache.claim("latent", "cd" * 32) as other,
    ):
        assert (mine, text, other) == (False, True, True)
    (tmp_path / "let-go").touch()
    finish(holders[0])
    with cache.claim("latent", KEY) as mine:
        assert mine

    holders.append(start(hold, tmp_path, KEY, ready, "never"))
    assert ready.get(timeout=60) is True
    os.kill(holders[1].pid, signal.SIGKILL)
    holders[1].join()
    with cache.claim("latent", KEY) as mine:
        assert mine, "the claim outlived its holder"


def test_process_gets_its_own_claim_again_and_keeps_it_until_the_last_end(tmp_path):
    cache, answer = Cache(tmp_path), SPAWN.Queue()
    with cache.claim("latent", KEY):
        with Cache(tmp_path).claim("latent", KEY) as again:
            assert again
        finish(start(ask, tmp_path, KEY, answer))
        assert answer.get(timeout=60) is False
    finish(start(ask, tmp_path, KEY, answer))
    assert answer.get(timeout=60) is True


def test_claim_ends_with_an_error_in_its_block(tmp_path):
    cache, answer = Cache(tmp_path), SPAWN.Queue()
    with pytest.raises(KeyboardInterrupt), cache.claim("latent", KEY):
        raise KeyboardInterrupt
    finish(start(ask, tmp_path, KEY, answer))
    assert answer.get(timeout=60) is True


def hold_and_leave_a_child(folder, child):
    """Ends at once, and leaves a forked child behind, as a decoder that outlives its killed parent."""
    with Cache(folder).claim("latent", KEY):
        if pid := os.fork():
            child.put(pid)
            child.close()
            child.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        os._exit(0)


def test_child_that_outlives_its_parent_holds_no_claim(tmp_path):
    children = SPAWN.Queue()
    parent = start(hold_and_leave_a_child, tmp_path, children)
    child = children.get(timeout=60)
    try:
        parent.join(60)
        os.kill(child, 0)
        with Cache(tmp_path).claim("latent", KEY) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_another_process_dies_over_is_made_here(tmp_path):
    cache, ready, made = Cache(tmp_path), SPAWN.Queue(), []
    holder = start(hold, tmp_path, KEY, ready, "never")
    assert ready.get(timeout=60)
    began = time.monotonic()

    def make(key):
        made.append((key, time.monotonic() - began))
        if key != KEY:
            time.sleep(0.5)
            os.kill(holder.pid, signal.SIGKILL)
        cache.write("latent", key, {"latent": torch.ones(1)}, {})

    done = []
    cache.fill("latent", [KEY, "cd" * 32], make, lambda: done.append(len(made)))
    holder.join()
    assert [key for key, _ in made] == ["cd" * 32, KEY] and made[1][1] >= 0.5, "it went on, and came back"
    assert done == [1, 2] and cache.keys("latent") == {KEY, "cd" * 32}


def test_entry_that_another_process_finishes_is_waited_for_and_not_made_again(tmp_path):
    cache, ready = Cache(tmp_path), SPAWN.Queue()
    holder = start(hold, tmp_path, KEY, ready, "let-go")
    assert ready.get(timeout=60)

    def make(key):
        assert key != KEY, "made twice"
        cache.write("latent", KEY, {"latent": torch.ones(1)}, {})  # in the holder's place
        cache.write("latent", key, {"latent": torch.ones(1)}, {})

    cache.fill("latent", [KEY, "cd" * 32], make, lambda: None)
    (tmp_path / "let-go").touch()
    finish(holder)
    assert cache.keys("latent") == {KEY, "cd" * 32}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_disk_without_locks_costs_double_work_and_no_run(tmp_path, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with Cache(tmp_path).claim("latent", KEY) as mine:
        assert mine


def test_any_number_of_caches_and_claims_takes_one_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        with Cache(tmp_path).claim("latent", key_of(number)) as mine:
            assert mine
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert shared(Path(tmp_path, ".claims")) is shared(tmp_path / ".claims")
    assert [path.name for path in tmp_path.iterdir()] == [".claims"]
