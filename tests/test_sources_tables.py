"""Tables of clips and captions, of this project and of others, and folders with one."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.sources_material import ROOT, captions, read, write, write_tar
from wan_finetune.errors import InputError


@pytest.mark.parametrize(
    "name", ["t.jsonl", "t.json", "lines.json", "t.csv", "semicolons.csv", "tabs.csv", "t.parquet"]
)
def test_the_same_rows_read_the_same_from_every_kind_of_table(tmp_path, name):
    rows = [("a.mp4", "a dog, running"), ("sub/b.png", '她说 "hi"\nand left'), ("./c.mp4", " x ")]
    write(tmp_path, **{"a.mp4": None, "sub__b.png": None, "c.mp4": None})
    path = tmp_path / name
    lines = [json.dumps({"file_name": clip, "caption": text}) for clip, text in rows]
    if path.suffix == ".parquet":
        clips, texts = zip(*rows, strict=True)
        pq.write_table(pa.table({"file_name": clips, "caption": texts, "other": [1, 2, 3]}), path, row_group_size=2)
    elif path.suffix == ".csv":
        mark = {"t.csv": ",", "semicolons.csv": ";", "tabs.csv": "\t"}[name]
        quoted = ['"{}"{}"{}"'.format(clip, mark, text.replace('"', '""')) for clip, text in rows]
        path.write_text("\n".join([f"file_name{mark}caption", *quoted, ""]))
    elif name == "t.json":
        path.write_text(json.dumps([json.loads(line) for line in lines], indent=3))
    else:
        path.write_text("\n\n".join(lines))
    expected = {"a.mp4": ("a dog, running",), "sub/b.png": ('她说 "hi"\nand left',), "c.mp4": (" x ",)}
    found = captions(path, tmp_path)
    assert found == expected and list(found) == list(expected)


FORMS = {
    # The tables of other trainers, as their documents show them.
    "DiffSynth-Studio": ("metadata.csv", "video,prompt\nvideo1.mp4,A\nvideo2.mp4,B\n"),
    "VideoX-Fun": (
        "metadata.json",
        '[{"file_path": "video1.mp4", "text": "A", "type": "video"}, {"file_path": "video2.mp4", "text": "B"}]',
    ),
    "FastVideo": (
        "videos2caption.json",
        '[{"path": "video1.mp4", "cap": ["A"], "fps": 16}, {"path": "video2.mp4", "cap": "B"}]',
    ),
    "musubi-tuner": (
        "metadata.jsonl",
        '{"video_path": "FOLDER/video1.mp4", "caption": "A"}\n{"image_path": "video2.mp4", "caption": "B"}\n',
    ),
    "finetrainers": (
        "metadata.json",
        '{"data": [{"caption": "A", "image_path": "", "video_path": "video1.mp4", "height": 480},'
        ' {"caption": "B", "video_path": "video2.mp4"}]}',
    ),
    "datasets": (
        "metadata.jsonl",
        '{"file_name": "video1.mp4", "text": "A"}\n{"file_name": "video2.mp4", "text": "B"}',
    ),
    "diffusion-pipe": ("captions.json", '{"video1.mp4": ["A"], "video2.mp4": ["B"]}'),
    "a mapping": ("metadata.json", '{"version": 2, "video1.mp4": "A", "video2.mp4": {"caption": "B", "tags": []}}'),
}


@pytest.mark.parametrize("tool", FORMS)
def test_tables_of_other_tools_are_read_where_they_lie(tmp_path, tool):
    name, text = FORMS[tool]
    folder = tmp_path / "clips"
    write(folder, **{"video1.mp4": None, "video2.mp4": None, name: text.replace("FOLDER", str(folder))})
    expected = {"video1.mp4": ("A",), "video2.mp4": ("B",)}
    assert captions(folder, tmp_path) == captions(folder / name, tmp_path) == expected


def test_clips_in_the_videos_folder_and_lists_in_two_files_are_found(tmp_path):
    merged = write(
        tmp_path / "merged", **{"videos__x.mp4": None, "videos2caption.json": '[{"path": "x.mp4", "cap": "A"}]'}
    )
    assert captions(merged, tmp_path) == {"videos/x.mp4": ("A",)}
    lists = {"videos.txt": "videos/1.mp4\nvideos/2.mp4\n", "prompts.txt": "first\nsecond\n"}
    listed = write(tmp_path / "listed", **{"videos__1.mp4": None, "videos__2.mp4": None, **lists})
    assert captions(listed, tmp_path) == {"videos/1.mp4": ("first",), "videos/2.mp4": ("second",)}
    (listed / "prompts.txt").write_text("first\n")
    _, faults = read(listed, tmp_path)
    assert "prompts.txt ends before videos.txt; give each clip one line" in faults["videos.txt:2"]
    sidecar = write(
        tmp_path / "sidecar", **{"video.mp4": None, "video.txt": "x", "prompt.png": None, "prompt.txt": "y"}
    )
    assert captions(sidecar, tmp_path) == {"prompt.png": ("y",), "video.mp4": ("x",)}


def test_rows_of_one_clip_add_up_and_a_repeated_row_is_a_fault(tmp_path):
    folder = write(tmp_path / "clips", **{"a.mp4": None, "b.mp4": None, "c.mp4": None, "m.png": None, "n.png": None})
    write(folder, **{"d.mp4": None})
    rows = ["a.mp4,one,", "b.mp4,x,", "./a.mp4,two,", "a.mp4,one,", f"{folder}/a.mp4,three,", "c.mp4,p,m.png"]
    write(folder, **{"t.csv": "\n".join(["video,prompt,mask", *rows, "d.mp4,y,", "c.mp4,q,n.png"])})
    items, faults = read(folder / "t.csv", tmp_path)
    assert {name: item.captions for name, item in items.items()} == {
        "b.mp4": ("x",),
        "a.mp4": ("one", "two", "three"),
        "c.mp4": ("p",),
        "d.mp4": ("y",),
    }
    assert list(items) == ["b.mp4", "a.mp4", "d.mp4", "c.mp4"], "each where its last row is"
    assert faults["t.csv:5"] == "a.mp4 has this caption in row 2 already; remove one of the two rows"
    assert "c.mp4 has another mask in row 7; keep one" in faults["t.csv:9"] and len(faults) == 2


def test_several_captions_and_masks_of_a_row_are_taken(tmp_path):
    folder = write(
        tmp_path / "clips", **{"a.mp4": None, "b.mp4": None, "c.mp4": None, "masks__a.png": None, "b.mask.mp4": None}
    )
    rows = [{"path": "a.mp4", "captions": ["one", None, "two", "one"], "mask": "masks/a.png"}]
    rows += [{"path": "b.mp4", "captions": "b", "mask": None}, {"path": "c.mp4", "captions": ["c"], "mask": "no.png"}]
    write(folder, **{"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    items, faults = read(folder, tmp_path)
    assert items["a.mp4"].captions == ("one", "two")
    assert items["a.mp4"].mask == folder / "masks/a.png" and items["b.mp4"].mask == folder / "b.mask.mp4"
    assert faults == {"metadata.jsonl:3": "c.mp4: its mask: no.png does not exist; check the name and the file"}


def test_a_folder_with_a_table_leaves_no_file_out_in_silence(tmp_path):
    folder = write(tmp_path / "clips", **{"named.mp4": None, "own.mp4": None, "own.txt": "beside", "none.mp4": None})
    write(
        folder, **{"both.mp4": None, "both.txt": "stale", "metadata.csv": "file_name,text\nnamed.mp4,A\nboth.mp4,B\n"}
    )
    write(folder, **{"sub__metadata.jsonl": "", "sub__deep.mp4": None, "extra.txt": "x"})
    items, faults = read(folder, tmp_path)
    assert {name: item.captions for name, item in items.items()} == {
        "named.mp4": ("A",),
        "both.mp4": ("B",),
        "own.mp4": ("beside",),
    }
    assert set(faults) == {"none.mp4", "sub/deep.mp4", "extra.txt", "metadata.csv"}
    assert "is not in metadata.csv and has no caption; add a row or none.txt" in faults["none.mp4"]
    assert "both.mp4 have captions in it and beside them as well; set path" in faults["metadata.csv"]
    write(folder, **{"metadata.jsonl": '{"file_name": "named.mp4", "text": "A"}'})
    with pytest.raises(InputError, match=r"2 tables, metadata\.jsonl and metadata\.csv; set path"):
        read(folder, tmp_path)


def test_each_subfolder_may_have_its_own_table(tmp_path):
    row = '{{"file_name": "{}.mp4", "text": "{}"}}'
    folder = write(tmp_path / "clips", **{"x__metadata.jsonl": row.format("a", "A") + "\n{", "x__a.mp4": None})
    write(
        folder, **{"y__z__metadata.jsonl": row.format("a", "B"), "y__z__a.mp4": None, "y__b.mp4": None, "y__b.txt": "C"}
    )
    items, faults = read(folder, tmp_path)
    assert {name: item.captions for name, item in items.items()} == {
        "x/a.mp4": ("A",),
        "y/b.mp4": ("C",),
        "y/z/a.mp4": ("B",),
    }
    assert items["x/a.mp4"].path == folder / "x/a.mp4" and "is not valid JSON" in faults["x/metadata.jsonl:2"]


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(tmp_path):
    folder = write(tmp_path / "clips [2024] {a,b}*", **{"a.mp4": None, "a.txt": "x"})
    assert captions(folder, tmp_path) == {"a.mp4": ("x",)}


def test_columns_of_other_names_are_set_in_the_configuration(tmp_path):
    folder = write(
        tmp_path / "clips", **{"a.mp4": None, "b.mp4": None, "t.csv": "video,text,Vid,Cap\na.mp4,A,b.mp4,B\n"}
    )
    assert captions(folder / "t.csv", tmp_path) == {"a.mp4": ("A",)}
    settings = {"video_column": "Vid", "caption_column": "Cap"}
    assert captions(folder / "t.csv", tmp_path, **settings) == {"b.mp4": ("B",)}


MEASURE = """
import sys, psutil
from pathlib import Path
from data.config import SourceConfig
from data.sources import read_source
import data.sources.table
process, peak = psutil.Process(), 0
before = process.memory_info().rss
for count, _ in enumerate(read_source(SourceConfig(path=Path(sys.argv[1])), Path("spool")), 1):
    if count % 500 == 0:
        peak = max(peak, process.memory_info().rss)
print(count, (peak - before) / 2**20)
"""


def write_long_table(path, total, caption):
    header, footer = {".json": ("[{}", "]"), ".csv": ("file_name,caption\n", "")}.get(path.suffix, ("", ""))
    with path.open("w") as file:
        file.write(header)
        for index in range(total):
            row = json.dumps({"file_name": f"c/{index}.mp4", "caption": caption})
            csv_row = f'c/{index}.mp4,"{caption}"\n'
            file.write({".jsonl": f"{row}\n", ".json": f",\n{row}", ".csv": csv_row}[path.suffix])
        file.write(footer)


@pytest.mark.parametrize(
    ("suffix", "total", "repeats", "limit_mib"),
    [
        (".jsonl", 5_000, 60, 5),
        (".json", 5_000, 60, 5),
        (".csv", 5_000, 60, 5),
        (".tar", 10_000, 0, 3),
        pytest.param(".jsonl", 200_000, 9, 30, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix, total, repeats, limit_mib):
    # Held in memory, the captions would take 16 MiB and more, the headers of the archive 6. Four clips exist; what is
    # missing is a fault of its row.
    write(tmp_path, **{f"c__{index}.mp4": None for index in range(4)})
    path = tmp_path / f"t{suffix}"
    if suffix == ".tar":
        write_tar(path, {f"{index}.txt": b"x" for index in range(total)})
    else:
        write_long_table(path, total, "a caption, long as the describers of today write them " * repeats)
    command = [sys.executable, "-c", MEASURE, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    count, growth_mib = result.stdout.split()
    assert int(count) == total + (suffix == ".json")  # {} is no row that can be used
    assert float(growth_mib) < limit_mib
