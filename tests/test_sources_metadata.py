"""Corrupt tables and captions: each fault is one message with its row and remedy, and no path leads out of the root."""

import codecs
import io
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.documents import Scanner, document_rows
from data.sources.paths import DataRoot, Unusable
from data.sources.text import is_blank
from tests.sources_material import captions, read, write
from wan_finetune.captions import clean_caption
from wan_finetune.errors import InputError

GOOD = {"file_name": "good.mp4", "caption": "a ball"}


@pytest.fixture
def folder(tmp_path):
    """Clips inside the folder of the tables, and one outside that nothing may lead to."""
    write(tmp_path, **{"outside__secret.mp4": None})
    folder = write(tmp_path / "clips", **{"good.mp4": None, "sub__b.mp4": None, "notes.md": None})
    (folder / "link.mp4").symlink_to(tmp_path / "outside/secret.mp4")
    (folder / "way").symlink_to(tmp_path / "outside")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder


def clip(name):
    return {"file_name": name, "caption": "a ball"}


def said(caption):
    return {"file_name": "good.mp4", "caption": caption}


ROWS = [
    # what a row names
    (clip("gone.mp4"), "gone.mp4 does not exist; check the name and the file"),
    (clip("good.mp4/x.mp4"), "does not exist; check"),
    (clip("x" * 300 + ".mp4"), r"xxx\.\.\.xxx.* cannot be reached \(File name too long\); check"),
    (clip("loop.mp4"), "cannot be reached .*; check the name"),
    (clip("../outside/secret.mp4"), r"leads out of the data folder by `\.\.`; put the clip below that folder"),
    (clip("sub/../../outside/secret.mp4"), "leads out of the data folder"),
    (clip("OUTSIDE/secret.mp4"), r"\.\.\./secret.mp4 is an absolute path out of the data folder; put"),
    (clip("/etc/passwd"), r"\.\.\./passwd is an absolute path out of the data folder"),
    (clip("link.mp4"), "link.mp4 is a link, or lies behind one, that leads out of the data folder; put"),
    (clip("way/secret.mp4"), "lies behind one, that leads out of the data folder"),
    (clip("..\\outside\\secret.mp4"), "leads out of the data folder"),
    (clip("https://host/a.mp4?token=hush"), r"is a URL \(https:\); download the clip and name the file$"),
    (clip("file:///etc/passwd"), "is a URL"),
    (clip(" s3://bucket/a.mp4"), "is a URL"),
    (clip("zip://a.mp4::hf://datasets/x/y"), "is a URL"),
    (clip("data:video/mp4;base64,AAAA"), "is a URL"),
    (clip(None), "names no clip; write its file name, or remove the row"),
    (clip(""), "names no clip"),
    (clip("  "), "is no file name; correct it"),
    (clip(7), "its file name is a number; write the name as text"),
    (clip(0.5), "its file name is a number"),
    (clip(True), "its file name is a truth value"),
    (clip(["good.mp4"]), "its file name is a list"),
    (clip({"path": "good.mp4"}), "its file name is an object"),
    (clip("good.mp4\0.txt"), "is no file name; correct it"),
    (clip("\ud800.mp4"), "is no file name; correct it"),
    (clip("."), "is a folder; name a video or a still"),
    (clip("sub"), "sub is a folder; name a video"),
    (clip("pipe.mp4"), "pipe.mp4 is a pipe or a device; put a regular file"),
    (clip("notes.md"), r"notes.md is no video or still of a kind that is read \(.mp4 .*\); convert it"),
    ({"caption": "a ball"}, "has no clip's file name; add one under file_name"),
    # what it says of it
    ({"file_name": "sub/b.mp4"}, "b.mp4: has no caption; add one under caption"),
    (said(""), "good.mp4: has no caption, its caption is empty; describe the clip there"),
    (said(None), "its caption is empty"),
    (said(" \n\t\u200b\ufeff"), "its caption is empty"),
    (said([]), "its caption is empty"),
    (said([None, ""]), "its caption is empty"),
    (said(5), "its caption is neither text nor a list of texts; write one"),
    (said({"en": "a"}), "its caption is neither text"),
    (said(["a", 5]), "its caption is neither text"),
    (said("x" * 2**20), "its caption is 1,048,576 characters long, more than 16,384; shorten it"),
    (said("a\0b\0"), "holds a NUL character.*; save it as UTF-8"),
    (said("a \u202ered\u202c ball"), r"holds an invisible U\+202E \(right-to-left override\).*; remove it"),
    (said("a \u2066ball"), r"U\+2066 \(left-to-right isolate\)"),
    (said("a \ud83d ball"), r"holds half a character \(U\+D83D\); write it again"),
]


@pytest.mark.parametrize(("row", "message"), ROWS, ids=range(len(ROWS)))
def test_a_row_that_cannot_be_used_is_named_and_the_next_one_is_read(folder, tmp_path, row, message):
    text = json.dumps(row).replace("OUTSIDE", str(tmp_path / "outside"))
    write(folder, **{"t.jsonl": f'{text}\n{{"file_name": "sub/b.mp4", "caption": "another"}}\n'})
    items, faults = read(folder / "t.jsonl", tmp_path)
    assert list(items) == ["sub/b.mp4"] and list(faults) == ["t.jsonl:1"]
    reason = faults["t.jsonl:1"]
    assert re.search(message, reason) and "\n" not in reason and len(reason) < 300 and "hush" not in reason


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.mp4", "caption": }', r"is not valid JSON \(Expecting value, column 35\); correct it"),
        ("{'file_name': 'a.mp4'}", "is not valid JSON"),
        ('{"file_name": "a.mp4", "caption": "cut', "is not valid JSON"),
        ("[1, 2]", "is no object; write"),
        ("null", "is no object; write"),
        ('{"x": ' * 100_000, "is nested too deep; write"),
        ("[" * 100_000, "is nested too deep; write"),
        ('{"x": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("x" * (2**23 + 10), "is longer than 8,388,608 characters; check"),
    ],
    ids=range(9),
)
def test_a_bad_line_of_json_lines_is_named_and_the_next_one_is_read(folder, tmp_path, line, message):
    write(folder, **{"t.jsonl": "\n".join([json.dumps(GOOD), "", line, '{"file_name": "sub/b.mp4", "caption": "b"}'])})
    items, faults = read(folder / "t.jsonl", tmp_path)
    assert list(items) == ["good.mp4", "sub/b.mp4"] and list(faults) == ["t.jsonl:3"]
    assert re.search(message, faults["t.jsonl:3"])


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        (
            f"[{json.dumps(GOOD)}, oops, 2]",
            2,
            r"is not valid JSON \(Expecting value\): nothing from here on can be read",
        ),
        (f"[{json.dumps(GOOD)}", 2, "ends too early: nothing from here"),
        (f"[{json.dumps(GOOD)}, ", 2, "is not valid JSON"),
        (f"[{json.dumps(GOOD)} {json.dumps(GOOD)}]", 2, "has '{' where , or ] is due"),
        (f"[{json.dumps(GOOD)}] tail", 2, "is followed by more text"),
        (f"[{json.dumps(GOOD)}, 5]", 2, "is no object"),
        (f"[{json.dumps(GOOD)}, {'[' * 100_000}", 2, "is nested too deep"),
        (f'{{"data": [{json.dumps(GOOD)}], "x": {{"a": ' + '{"a": ' * 100_000, 2, "is nested too deep"),
        ('{"good.mp4": "a ball", "gone.mp4": null}', 2, "does not exist"),
        ('{"good.mp4": "a ball", "sub/b.mp4": null}', 2, "its caption is empty"),
        ('{"good.mp4": "a ball", x: 1}', 2, "is due"),
    ],
)
def test_a_json_document_that_breaks_off_gives_what_came_before(folder, tmp_path, text, number, message):
    write(folder, **{"t.json": text})
    items, faults = read(folder / "t.json", tmp_path)
    assert list(items) == ["good.mp4"] and list(faults) == [f"t.json:{number}"]
    assert re.search(message, faults[f"t.json:{number}"])


@given(st.lists(st.text(max_size=60), max_size=20), st.sampled_from([None, 0, 3]), st.integers(1, 40))
@settings(max_examples=200)
def test_a_document_read_in_pieces_is_what_json_reads_whole(texts, indent, chunk):
    rows = [{"caption": text, "number": [index, -1.5e3, True, None, {"x": text}]} for index, text in enumerate(texts)]
    document = json.dumps(rows, indent=indent, ensure_ascii=bool(chunk % 2))
    scanner = Scanner(io.StringIO(document), 10_000, chunk_characters=chunk)
    assert scanner.value() == rows and scanner.peek() == ""
    assert [row for _, row in document_rows(io.StringIO(document), 10_000)] == rows
    numbers = Scanner(io.StringIO("[12345,678]"), 10_000, chunk_characters=chunk)
    assert (numbers.take("["), numbers.value(), numbers.take(","), numbers.value()) == ("[", 12345, ",", 678)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("good.mp4,a dog, running", "has 3 cells for 2 columns; put a caption with commas in double quotes"),
        ("good.mp4", "its caption is empty; describe"),
        (",a dog", "names no clip"),
        ('good.mp4,"a dog" runs', "is not valid CSV .*put the caption in double quotes"),
        ("good.mp4," + "x" * 2**20, "field larger than field limit|1,048,576 characters long"),
    ],
)
def test_a_bad_line_of_csv_is_named_and_the_next_one_is_read(folder, tmp_path, line, message):
    write(folder, **{"t.csv": f"file_name,caption\n\n{line}\nsub/b.mp4,b\n"})
    items, faults = read(folder / "t.csv", tmp_path)
    assert list(items) == ["sub/b.mp4"] and list(faults) == ["t.csv:2"]
    assert re.search(message, faults["t.csv:2"])


def test_a_quote_that_is_never_closed_does_not_swallow_the_table(folder, tmp_path):
    write(folder, **{"t.csv": 'file_name,caption\ngood.mp4,x\nsub/b.mp4,"open\n' + "sub/b.mp4,b\n" * 5})
    items, faults = read(folder / "t.csv", tmp_path)
    assert list(items) == ["good.mp4"] and "is not valid CSV (unexpected end of data)" in faults["t.csv:3"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_tables_with_a_byte_order_mark_are_read(folder, tmp_path, name, encoding):
    text = {"t.jsonl": json.dumps(GOOD), "t.json": json.dumps([GOOD]), "t.csv": "file_name,caption\ngood.mp4,a ball"}[
        name
    ]
    text = text.replace("a ball", "一只猫 é")
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}
    (folder / name).write_bytes(mark.get(encoding, b"") + text.encode(encoding))
    assert captions(folder / name, tmp_path) == {"good.mp4": ("一只猫 é",)}
    if encoding == "utf-16-le":
        (folder / name).write_bytes(text.replace("一只猫 é", "a ball").encode(encoding))
        with pytest.raises(InputError, match="looks like UTF-16 without a byte-order mark; save it as UTF-8"):
            read(folder / name, tmp_path)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_captions_beside_clips_may_have_a_byte_order_mark(tmp_path, mark):
    encoding = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le"}.get(mark, "utf-16-be")
    write(tmp_path / "c", **{"a.mp4": None, "a.txt": mark + "一只猫\r\nzwei".encode(encoding)})
    assert captions(tmp_path / "c", tmp_path) == {"a.mp4": ("一只猫", "zwei")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a ball".encode("utf-16-le"), "its caption a.txt looks like UTF-16 without a byte-order mark; save it"),
        ("一只红色的猫".encode("gbk"), "its caption a.txt is not UTF-8; save it as UTF-8"),
        (b"x" * (2**20 + 1), "its caption a.txt is larger than 1 MiB; check"),
        (b"x" * 2**20, "its caption is 1,048,576 characters long"),
        ("x\u202ey".encode(), "invisible U+202E"),
        (b"a red ball\0 rolls", "NUL character"),
        (codecs.BOM_UTF16_LE + b"x", "is not UTF-8"),
    ],
    ids=range(7),
)
def test_a_caption_file_that_cannot_be_used_is_named(tmp_path, content, message):
    write(tmp_path / "c", **{"a.mp4": None, "a.txt": content})
    items, faults = read(tmp_path / "c", tmp_path)
    assert not items and message in faults["a.mp4"]


def test_a_row_in_another_encoding_is_a_fault_of_that_row_alone(folder, tmp_path):
    rows = b'{"file_name": "good.mp4", "caption": "caf\xe9"}\n{"file_name": "sub/b.mp4", "caption": "b"}'
    write(folder, **{"t.jsonl": rows, "t.csv": b"file_name,caption\ngood.mp4,caf\xe9\nsub/b.mp4,b\n"})
    for name, number in (("t.jsonl", 1), ("t.csv", 2)):
        items, faults = read(folder / name, tmp_path)
        assert list(items) == ["sub/b.mp4"]
        assert faults == {f"{name}:{number}": "good.mp4: its caption is not UTF-8; save it as UTF-8"}
    write(folder, **{"t.csv": b"file_name,caption,\xe9\ngood.mp4,x,\n"})
    with pytest.raises(InputError, match="its header is not UTF-8"):
        read(folder / "t.csv", tmp_path)


def test_control_characters_that_remain_are_removed_by_the_cleaning(folder, tmp_path):
    raw = "a\x01 red\x0b\x1b ball\x7f\tor\r\ntwo\ufeff"
    write(folder, **{"t.jsonl": json.dumps({**GOOD, "caption": raw})})
    ((caption,),) = captions(folder / "t.jsonl", tmp_path).values()
    assert caption == raw
    assert clean_caption(caption).isprintable()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", "", "holds no row; add one for each clip"),
        (
            "t.jsonl",
            '{"caption": "x"}\n{"caption": "y"}',
            "no column with the clips; its columns are caption: name one f",
        ),
        (
            "t.jsonl",
            '{"file_name": "good.mp4"}',
            "no column with the captions; its columns are file_name: name one caption",
        ),
        ("t.json", "", "is empty; write"),
        ("t.json", "5", "is neither a JSON list nor an object"),
        ("t.json", "[]", "holds no row"),
        ("t.json", "{}", "holds no row"),
        ("t.json", "\n\n", "is empty"),
        ("t.csv", "", "is empty; write a header"),
        ("t.csv", "file_name,caption\n", "holds no row"),
        ("t.csv", "good.mp4,a dog\n", "holds no row"),
        ("t.csv", "good.mp4,a dog\nsub/b.mp4,x\n", "no column with the clips; its columns are good.mp4, a dog"),
        ("t.csv", "file_name,words\ngood.mp4,x\n", "no column with the captions; its columns are file_name, words"),
        ("t.parquet", "no parquet", "is no readable parquet file .*; write it again"),
        ("videos.txt", "good.mp4\n", "no list of captions lies beside it; add captions.txt"),
    ],
)
def test_a_table_without_rows_or_columns_is_an_input_error(folder, tmp_path, name, text, message):
    write(folder, **{name: text})
    with pytest.raises(InputError, match=f"^data.sources: .*{name}: .*{message}"):
        read(folder / name, tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet"])
def test_a_table_that_is_a_pipe_is_not_waited_for(folder, tmp_path, name):
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is a pipe or a device; put a regular file there"):
        read(folder, tmp_path)


def test_a_parquet_table_names_what_is_wrong_with_its_rows_and_its_end(folder, tmp_path):
    table = pa.table({"file_name": ["good.mp4", None, "../x.mp4"], "caption": ["a", "b", None]})
    pq.write_table(table, folder / "t.parquet")
    items, faults = read(folder / "t.parquet", tmp_path)
    assert list(items) == ["good.mp4"] and set(faults) == {"t.parquet:2", "t.parquet:3"}
    pq.write_table(pa.table({"file_name": [1, 2], "caption": ["a", "b"]}), folder / "n.parquet")
    assert set(read(folder / "n.parquet", tmp_path)[1].values()) == {
        "its file name is a number; write the name as text, or remove the row"
    }
    pq.write_table(pa.table({"clip_name": ["a"], "caption": ["a"]}), folder / "c.parquet")
    with pytest.raises(InputError, match="no column with the clips; its columns are clip_name, caption"):
        read(folder / "c.parquet", tmp_path)
    rows = 4_000
    long = pa.table({"file_name": [f"{index}.mp4" for index in range(rows)], "caption": ["a" * 50] * rows})
    pq.write_table(long, folder / "cut.parquet", row_group_size=1_000, compression="zstd", use_dictionary=False)
    content = bytearray((folder / "cut.parquet").read_bytes())
    start = pq.read_metadata(folder / "cut.parquet").row_group(2).column(0).data_page_offset
    content[start : start + 100] = bytes(100)
    (folder / "cut.parquet").write_bytes(content)
    _, faults = read(folder / "cut.parquet", tmp_path)
    assert list(faults)[-1] == f"cut.parquet:{len(faults)}" and 1_000 < len(faults) < rows
    assert "cannot be read, nor what follows" in list(faults.values())[-1]


@pytest.mark.parametrize("text", ["", " ", "\t\u3000\xa0", "\u200b\u200d", "\ufeff", "\x0b"])
def test_text_of_which_nothing_is_seen_is_blank(text):
    assert is_blank(text)
    assert not any(is_blank(text + seen) for seen in ("x", "猫", "é", "。", "&"))


# The resolver

PARTS = st.sampled_from(
    ["a.mp4", "sub", "b.mp4", "..", ".", "", "in.mp4", "out.mp4", "way", "back", "loop", "pipe", "deep", "~", "a\\b"]
)
NAMES = st.one_of(
    st.builds(
        lambda start, parts, mark: start + mark.join(parts),
        st.sampled_from(["", "/", "ROOT/", "OUTSIDE/", "file://", "./"]),
        st.lists(PARTS, min_size=1, max_size=7),
        st.sampled_from(["/", "/", "\\", "//"]),
    ),
    st.text(alphabet=st.sampled_from(list("ab./\\~:$\0 \n\u202e\ud800é*")), max_size=12),
    st.text(max_size=20),
    st.none() | st.integers() | st.floats() | st.booleans() | st.binary(max_size=4),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A root with links inwards, outwards and in a circle, and a neighbour whose name begins like the root's."""
    base = tmp_path_factory.mktemp("resolver")
    root, outside = base / "root", base / "root2"
    write(root, **{"a.mp4": None, "sub__b.mp4": None, "sub__deep__a.mp4": None, "a\\b": None})
    write(outside, **{"a.mp4": None, "b.mp4": None})
    (root / "in.mp4").symlink_to("sub/b.mp4")
    (root / "back").symlink_to(root / "sub")
    (root / "out.mp4").symlink_to(outside / "a.mp4")
    (root / "way").symlink_to(outside)
    (root / "sub/way").symlink_to("../../root2")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    return root, outside


def opened_by_the_system(path):
    """Where the kernel ends up with a path, or None where it finds nothing."""
    try:
        descriptor = os.open(path, os.O_PATH)
    except (OSError, ValueError):
        return None
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def resolve_safely(places, value):
    """The resolver's answer lies inside, is a file, and is found under its name; a plain file inside is not refused."""
    root, outside = places
    if isinstance(value, str):
        value = value.replace("ROOT", str(root)).replace("OUTSIDE", str(outside))
    finder = DataRoot(root)
    try:
        name, path = finder.find(value)
    except Unusable as fault:
        assert str(root) not in str(fault) and "\n" not in str(fault)
        if isinstance(value, str) and not value.startswith("file:"):
            real = opened_by_the_system(os.path.join(root, value))
            assert real is None or not real.is_relative_to(root.resolve()) or not real.is_file()
        return
    assert path.resolve(strict=True).is_relative_to(root.resolve()) and path.is_file()
    assert path == root / name and ".." not in Path(name).parts and not name.startswith("/")
    assert finder.name(value) == name and finder.find_listed(name) == (name, path)
    if "\\" not in value:
        assert path.resolve() == opened_by_the_system(os.path.join(root, value))


@given(NAMES)
@settings(max_examples=300)
def test_nothing_that_the_resolver_returns_lies_outside_the_root(places, value):
    resolve_safely(places, value)


@pytest.mark.slow
@given(NAMES)
@settings(max_examples=10_000)
def test_nothing_that_the_resolver_returns_lies_outside_the_root_in_ten_thousand(places, value):
    resolve_safely(places, value)


def test_the_resolver_accepts_what_lies_inside(places):
    root, _ = places
    finder = DataRoot(root)
    for value, name in {
        "a.mp4": "a.mp4",
        "./sub//b.mp4": "sub/b.mp4",
        "sub/../a.mp4": "a.mp4",
        "in.mp4": "in.mp4",
        "back/b.mp4": "back/b.mp4",
        f"{root}/sub/b.mp4": "sub/b.mp4",
        "sub\\deep\\a.mp4": "sub/deep/a.mp4",
        "a\\b": "a\\b",
        "way/../root/a.mp4": "a.mp4",
    }.items():
        assert finder.find(value) == (name, root / name) and finder.name(value) == name
