"""Datasets of the Hub and saved ones: read undecoded, spooled once, and never a file that is not theirs."""

import hashlib
import io

import datasets
import pytest

from tests.sources_material import MP4, PNG, captions, read, spooled, write, write_tar
from wan_finetune.errors import InputError


def videos(split="train", **extra):
    columns = {"video": [{"bytes": MP4 + bytes([index]), "path": f"dir/{index}.mov"} for index in range(2)]}
    columns |= {"caption": ["A", ["B"][0]], "number": [1, 2], **extra}
    data = datasets.Dataset.from_dict(columns, split=split)
    return data.cast_column("video", datasets.Video(decode=False)).cast_column("video", datasets.Video())


def test_a_saved_dataset_is_read_undecoded_and_spooled_once(tmp_path):
    stills = [{"bytes": PNG + b"0", "path": None}, {"bytes": PNG + b"1", "path": None}]
    data = videos(mask=stills).cast_column("mask", datasets.Image())
    data.save_to_disk(str(tmp_path / "saved"))
    items, faults = read(tmp_path / "saved", tmp_path)
    assert not faults
    assert [(name, item.captions) for name, item in items.items()] == [
        ("train/1-0.mov", ("A",)),
        ("train/2-1.mov", ("B",)),
    ]
    for index, item in enumerate(items.values()):
        content = MP4 + bytes([index])
        assert item.path.name == f"{hashlib.sha256(content).hexdigest()}.mov" and item.path.read_bytes() == content
        assert item.mask.suffix == ".png" and item.mask.read_bytes() == PNG + f"{index}".encode()
    before = spooled(tmp_path)
    assert len(before) == 4
    assert read(tmp_path / "saved", tmp_path)[0] == items and spooled(tmp_path) == before


def test_a_split_of_a_saved_dataset_is_chosen_and_a_missing_one_named(tmp_path):
    datasets.DatasetDict(train=videos(), test=videos("test")).save_to_disk(str(tmp_path / "saved"))
    assert list(captions(tmp_path / "saved", tmp_path, split="test")) == ["test/1-0.mov", "test/2-1.mov"]
    with pytest.raises(InputError, match="no split dev; it has train, test: set split"):
        read(tmp_path / "saved", tmp_path, split="dev")


def test_dataset_rows_that_cannot_be_used_are_named(tmp_path):
    rows = [
        {"clip": {"bytes": MP4, "path": None}, "text": "A"},
        {"clip": None, "text": "B"},
        {"clip": {"bytes": b"", "path": "x.mp4"}, "text": "C"},
        {"clip": {"bytes": b"no medium", "path": None}, "text": "D"},
        {"clip": {"bytes": None, "path": "/etc/passwd"}, "text": "E"},
        {"clip": {"bytes": MP4, "path": "y.mp4"}, "text": " "},
    ]
    # As plain cells: `datasets` would put the file that a Video names into what it saves.
    clip = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(clip=clip, text=datasets.Value("string")))
    data.save_to_disk(str(tmp_path / "saved"))
    items, faults = read(tmp_path / "saved", tmp_path)
    assert list(items) == ["train/1.mp4"]
    assert "holds no clip" in faults["train:2"] and "is empty (0 bytes)" in faults["train:3"]
    assert "no video or still of a kind that is read" in faults["train:4"]
    assert ".../passwd is an absolute path out of the data folder" in faults["train:5"]
    assert "its text is empty; describe" in faults["train:6"]


def test_a_saved_dataset_without_the_columns_or_damaged_is_an_input_error(tmp_path):
    videos().remove_columns(["video"]).save_to_disk(str(tmp_path / "clipless"))
    videos().remove_columns(["caption"]).save_to_disk(str(tmp_path / "wordless"))
    videos().save_to_disk(str(tmp_path / "cut"))
    arrow = next((tmp_path / "cut").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    for name, message in {
        "clipless": "no column with the clips; its columns are caption, number",
        "wordless": "no column with the captions; its columns are video, number",
        "cut": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            read(tmp_path / name, tmp_path)
    with pytest.raises(InputError, match="has no column film; its columns are video, caption, number: correct video"):
        videos().save_to_disk(str(tmp_path / "whole"))
        read(tmp_path / "whole", tmp_path, video_column="film")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`load_dataset` reads a local folder in place of the Hub; its arguments are kept."""
    folder, calls, real = tmp_path / "repository", [], datasets.load_dataset

    def load(name, subset=None, **arguments):
        calls.append((name, subset, dict(arguments)))
        arguments.pop("revision")
        return real(str(folder), subset, cache_dir=str(tmp_path / "cache"), **arguments)

    folder.mkdir()
    monkeypatch.setattr(datasets, "load_dataset", load)
    return folder, calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_read_whole_or_streamed(tmp_path, hub, streaming):
    folder, calls = hub
    videos().to_parquet(str(folder / "train.parquet"))
    settings = {"dataset": "me/clips", "revision": "v1", "streaming": streaming}
    items, faults = read(None, tmp_path, **settings)
    assert not faults
    assert {name: item.captions for name, item in items.items()} == {"train/1-0.mov": ("A",), "train/2-1.mov": ("B",)}
    assert [item.path.read_bytes() for item in items.values()] == [MP4 + b"\0", MP4 + b"\1"]
    wanted = {"split": "train", "streaming": streaming, "revision": "v1"}
    assert calls == [("hf://datasets/me/clips", None, wanted)]
    assert not any("token" in str(call) for call in calls)


def test_a_webdataset_of_the_hub_is_read_by_its_own_column_names(tmp_path, hub):
    folder, _ = hub
    write_tar(
        folder / "train-0.tar",
        {"a.mp4": MP4, "a.json": b'{"caption": "A"}', "b.mp4": MP4 + b"b", "b.json": b'{"caption": "B"}'},
    )
    assert list(captions(None, tmp_path, dataset="me/clips", streaming=True).values()) == [("A",), ("B",)]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_files_of_the_dataset_itself_are_opened(tmp_path, hub, monkeypatch, streaming):
    folder, _ = hub
    write(folder, **{"train__a.mp4": None, "train__metadata.jsonl": '{"file_name": "a.mp4", "text": "A"}'})
    _, faults = read(None, tmp_path, dataset="me/clips", streaming=streaming)
    assert "names .../a.mp4, which the dataset does not hold" in faults["train:1"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    items, faults = read(None, tmp_path, dataset="me/clips", streaming=streaming)
    assert [item.path.name for item in items.values()] == ["a.mp4"] and not faults


def test_a_streamed_file_of_the_dataset_is_fetched_into_the_spool(tmp_path, monkeypatch):
    addresses = ["hf://datasets/me/clips@abc/a.mp4", "hf://datasets/me/other@abc/a.mp4", "https://host/a.mp4"]
    rows = [{"video": {"bytes": None, "path": address}, "text": "A"} for address in addresses]
    features = datasets.Features(video=datasets.Video(), text=datasets.Value("string"))
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    opened = []
    monkeypatch.setattr("datasets.utils.file_utils.xopen", lambda name, mode: opened.append(name) or io.BytesIO(MP4))
    items, faults = read(None, tmp_path, dataset="me/clips", streaming=True)
    assert opened == addresses[:1] and [item.path.read_bytes() for item in items.values()] == [MP4]
    assert set(faults) == {"train:2", "train:3"} and len(spooled(tmp_path)) == 1


def test_the_hub_out_of_reach_is_one_message(tmp_path):
    # Nothing is replaced: the tests run with HF_HUB_OFFLINE.
    with pytest.raises(InputError, match=r"me/clips: the Hub cannot be reached .*check the network"):
        read(None, tmp_path, dataset="me/clips")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"),
            "no such dataset on the Hub, or a",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset"), "is gated; accept its terms"),
        (datasets.exceptions.DatasetNotFoundError("Revision 'v9' doesn't exist"), "no revision v9; correct revision"),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "no split train .*train.*set split"),
        (ValueError("BuilderConfig 'b' not found. Available: ['a']"), "no subset given .*Available.*set subset"),
        (ConnectionError("Couldn't reach"), "the Hub cannot be reached"),
        (OSError("token hf_abcdefghijkl refused\nand more"), "cannot be read .*hf_\\.\\.\\. refused"),
    ],
)
def test_faults_of_the_hub_become_one_message_with_a_remedy(tmp_path, monkeypatch, error, message):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=f"data.sources: me/clips: .*{message}") as caught:
        read(None, tmp_path, dataset="me/clips", revision="v9")
    assert "abcdefghijkl" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_stream_that_breaks_off_and_a_column_of_names_are_input_errors(tmp_path, monkeypatch):
    def rows():
        yield {"video": {"bytes": MP4, "path": None}, "text": "A"}
        raise ConnectionError("gone")

    features = datasets.Features(video=datasets.Video(), text=datasets.Value("string"))
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(InputError, match=r"me/clips: row 2 cannot be read .*start again"):
        read(None, tmp_path, dataset="me/clips", streaming=True)
    names = datasets.Dataset.from_dict({"video": ["a.mp4"], "text": ["A"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: names)
    with pytest.raises(
        InputError, match=r"its column video names files and holds none; download .*hf download me/clips"
    ):
        read(None, tmp_path, dataset="me/clips")


def test_a_parquet_file_with_the_clips_in_it_needs_no_dataset(tmp_path):
    videos().to_parquet(str(tmp_path / "part.parquet"))
    items, faults = read(tmp_path / "part.parquet", tmp_path)
    assert not faults and list(items) == ["part.parquet/1-0.mov", "part.parquet/2-1.mov"]
    assert [item.path.read_bytes() for item in items.values()] == [MP4 + b"\0", MP4 + b"\1"]
