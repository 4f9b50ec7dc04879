"""The cache with damaged entries and on disks that are in the way: the file, the fault and the remedy are named."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from data.cache import Cache, require_space
from tests.disk_faults import largest_file, small_disk, unprivileged
from wan_finetune.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
KEY, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def written(cache, kind="text", key=KEY, size=64, record=None):
    cache.write(kind, key, {kind: torch.randn(size)}, record or {})
    return cache.path(kind, key)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("cut", "cut short: "),
        ("cut in the header", "cut short or no safetensors file, 100 bytes"),
        ("empty", "cut short or no safetensors file, 0 bytes"),
        ("grown", " were written"),
        ("flipped in a value", "checksum does not match"),
        ("flipped in the record", "checksum does not match"),
        ("swapped", "belongs to another key"),
        ("noise", "cut short or no safetensors file"),
        ("of another program", "header is not one that this cache writes"),
        ("nan", "checksum does not match"),
        ("without the tensor", "holds no tensor 'text' that can be read"),
    ],
)
def test_damaged_entry_is_removed_with_a_message_and_counts_as_missing(cache, capsys, damage, fault):
    path = written(cache, record={"caption": "red"})
    written(cache, key=OTHER)
    content = path.read_bytes()
    if damage == "without the tensor":
        cache.write("text", KEY, {"other": torch.ones(2)}, {})
    else:
        path.write_bytes(
            {
                "cut": content[:-9],
                "cut in the header": content[:100],
                "empty": b"",
                "grown": content + b"\0",
                "flipped in a value": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
                "flipped in the record": content.replace(b"red", b"rad"),
                "swapped": cache.path("text", OTHER).read_bytes(),
                "noise": b"\xff" * 200,
                "of another program": safetensors.torch.save({"text": torch.ones(3)}, {"key": KEY}),
                "nan": content[:-4] + b"\x00\x00\xc0\x7f",
            }[damage]
        )
    out = torch.empty(64)
    assert cache.read_into("text", KEY, out) is False
    assert not path.exists() and cache.keys("text") == {OTHER}
    message = capsys.readouterr().err
    assert message.startswith(
        f"warning: {path}: damaged cache entry removed; it is made again when the caches are next"
    )
    assert fault in message and message.count("\n") == 1
    assert cache.read("text", OTHER, {"text": [64]}) is not None


def test_damage_that_another_process_has_mended_meanwhile_stays_mended(cache, capsys, monkeypatch):
    path = written(cache)
    mended = path.read_bytes()
    path.write_bytes(mended[:-1])
    fstat = os.fstat

    def mend_first(descriptor):
        # The reader has the damaged file open; its path already leads to a new one.
        status = fstat(descriptor)
        if status.st_size < len(mended):
            new = path.with_name("new")
            new.write_bytes(mended)
            new.replace(path)
        return status

    monkeypatch.setattr(os, "fstat", mend_first)
    assert cache.read("text", KEY) is not None and path.read_bytes() == mended
    assert capsys.readouterr().err == ""


def test_sound_entry_of_a_wrong_shape_is_named_and_stays(cache):
    path = written(cache, "latent")
    assert cache.read("latent", KEY, {"latent": [64]}).keys() == cache.read("latent", KEY, {"latent": [None]}).keys()
    for use in (
        lambda: cache.read("latent", KEY, {"latent": [16, 2, 2, 2]}),
        lambda: cache.read("latent", KEY, {"latent": [None, 1]}),
        lambda: cache.read_into("latent", KEY, torch.empty(63)),
        lambda: cache.read_into("latent", KEY, torch.empty(64, dtype=torch.float16)),
    ):
        with pytest.raises(InputError, match=r"cache entry holds .*\[64\], .* is due; remove the file and run again"):
            use()
    assert path.exists()


SHORTEN = """
import sys
from pathlib import Path
import safetensors.torch
from data.cache import Cache

cache, key = Cache(Path(sys.argv[1])), sys.argv[2]
path = cache.path("latent", key)
content = path.read_bytes()
read = cache.read("latent", key)["latent"]
path.open("r+b").truncate(0)
print("sum", read.sum().item(), flush=True)
path.write_bytes(content)
mapped = safetensors.torch.load_file(path)["latent"]
path.open("r+b").truncate(0)
print("sum", mapped.sum().item(), flush=True)
"""


def test_file_that_is_shortened_after_it_was_read_kills_nobody(cache):
    cache.write("latent", KEY, {"latent": torch.ones(2**20)}, {})
    child = subprocess.run(
        [sys.executable, "-c", SHORTEN, cache.folder, KEY], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    # The second half shows what would happen with the library's memory map, so that the first half means something.
    assert child.stdout == "sum 1048576.0\n" and child.returncode == -signal.SIGBUS, child.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(cache, value):
    with pytest.raises(InputError, match=r"std holds NaN or infinity; not cached\. Made from .*64x64x17.*; check"):
        tensors = {"latent": torch.ones(2), "std": torch.tensor([1.0, value])}
        cache.write("latent", KEY, tensors, {"bucket": "64x64x17"})
    assert not cache.folder.exists()


def test_disk_that_is_full_at_any_place_of_a_write_leaves_nothing_half_done(cache):
    size = len(written(cache, size=5000).read_bytes())
    cache.path("text", KEY).unlink()
    kept = written(cache, key=OTHER)
    for limit in range(0, size, size // 12):
        with largest_file(limit), pytest.raises(InputError, match=rf"{KEY}.*cannot write \d+ bytes: the disk is full"):
            written(cache, size=5000)
        assert [path for path in cache.folder.rglob("*") if path.is_file()] == [kept]
    with largest_file(size + 100):
        assert written(cache, size=5000).exists()


def test_small_disk_takes_what_fits_and_says_what_to_do(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, 2 * 2**20):
        cache = Cache(folder)
        fitting = []
        with pytest.raises(InputError, match=r"the disk is full.*data\.cache at another disk.*what is cached stays"):
            for number in range(100):
                written(cache, key=f"{number:064x}", size=50_000)
                fitting.append(f"{number:064x}")
        assert 5 <= len(fitting) <= 10 and cache.keys("text") == set(fitting)
        assert all(cache.read("text", key) is not None for key in fitting)
        assert not list(folder.rglob("*.tmp"))
        with pytest.raises(InputError, match=r"the cache needs 1\.00 GiB, 0\.00 GiB are free"):
            require_space(folder / "deeper", 2**30, "the cache")


def test_need_and_free_space_are_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    require_space(tmp_path / "not" / "yet", 2**30, "the cache")
    with pytest.raises(InputError, match=r"not/yet: the cache needs 1\.50 GiB, 1\.00 GiB are free"):
        require_space(tmp_path / "not" / "yet", 3 * 2**29, "the cache")


def test_folder_that_is_read_only_is_read_and_never_written(capsys):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        cache = Cache(folder / "cache")
        written(cache)
        damaged = written(cache, key=OTHER)
        damaged.write_bytes(b"damaged")
        locked = written(cache, key="ef" * 32)
        locked.chmod(0)
        for path in [cache.folder, *cache.folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)
        with unprivileged():
            assert cache.keys("text") == {KEY, OTHER, "ef" * 32} and cache.read("text", KEY) is not None
            assert cache.read("text", OTHER) is None and damaged.exists()
            assert "cannot be removed: Permission denied; remove it, or point data.cache" in capsys.readouterr().err
            with pytest.raises(
                InputError, match=f"{locked}: cannot be read .*Permission denied.*give this user the right"
            ):
                cache.read("text", "ef" * 32)
            with pytest.raises(InputError, match=r"cannot write .*Permission denied.*give this user the right"):
                written(cache, "latent")
            with (
                pytest.raises(InputError, match=r"cannot write to the cache .*Permission denied"),
                cache.claim("latent", KEY),
            ):
                pass
            with pytest.raises(InputError, match=r"cannot be removed.*Permission denied"):
                cache.prune("text", set())
        for path in [cache.folder, *cache.folder.rglob("*")]:
            path.chmod(0o755)


def test_cache_that_is_no_folder_is_named(tmp_path):
    path = tmp_path / "cache"
    path.write_text("a file")
    cache = Cache(path)
    for use in (lambda: cache.keys("text"), lambda: cache.read("text", KEY), lambda: written(cache)):
        with pytest.raises(InputError, match=r"Not a directory.*point data\.cache at another folder"):
            use()


def test_other_errors_of_a_disk_name_the_file(cache, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(InputError, match=rf"{KEY}\.safetensors: cannot write .*Input/output error.*check the disk"):
        written(cache)
