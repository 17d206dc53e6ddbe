"""Lists of images with columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from embedserve.errors import BadRequest, EmbedServeError, InvalidField, NotFound
from tests.training.data.samples import array, folder_of, picture
from training.data import Source, open_source
from training.data.table import as_text

ROWS = [
    {"path": "p/a.png", "label": "cat", "group": "g1", "split": "train", "colour": "red"},
    {"path": "p/b.png", "label": "dog", "group": "g2", "split": "test", "colour": ""},
    {"path": "p/c.png", "label": "", "group": "g1", "split": "", "colour": "red"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, ["p/a.png", "p/b.png", "p/c.png"])


def text(rows: list[dict[str, str]], separator: str = ",") -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(separator.join(line) for line in lines) + "\n"


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"list{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'train')")
        from pyarrow import parquet

        columns = {name: [row[name] or None for row in ROWS] for name in ROWS[0]}
        parquet.write_table(pyarrow.table(columns), file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        file.write_text(text(ROWS, "\t" if suffix == ".tsv" else ","))
    return file


def check(source: Source) -> None:
    assert source.keys == ("p/a.png", "p/b.png", "p/c.png")
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, -1]
    assert source.groups is not None
    assert source.groups[0] == source.groups[2] != source.groups[1]
    assert source.test.tolist() == [False, True, False]
    assert (array(source.read(2)) == array(picture(2))).all()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_form_of_list_says_the_same(folder: Path, suffix: str) -> None:
    check(open_source(write(folder, suffix)))


def test_a_spreadsheets_semicolons_and_byte_order_mark_are_understood(folder: Path) -> None:
    (folder / "list.csv").write_text(text(ROWS, ";"), encoding="utf-8-sig")
    check(open_source(folder / "list.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_any_column_can_label_and_group(folder: Path, suffix: str) -> None:
    source = open_source(write(folder, suffix), label_by="colour", group_by="label")
    assert source.class_names == ("red",)
    assert source.labels.tolist() == [0, -1, 0]
    assert source.groups is not None
    assert len(set(source.groups)) == 3


def test_an_unknown_column_is_refused_with_what_there_is(folder: Path) -> None:
    with pytest.raises(InvalidField, match=r"did you mean 'colour'.*'label', 'group', 'split', 'colour'"):
        open_source(write(folder, ".csv"), group_by="color")


def test_classes_that_are_numbers_are_in_the_order_of_numbers(folder: Path) -> None:
    (folder / "list.csv").write_text("path,label\np/a.png,10\np/b.png,9\np/c.png,10\n")
    source = open_source(folder / "list.csv")
    assert source.class_names == ("9", "10")
    assert source.labels.tolist() == [1, 0, 1]


def test_absolute_paths_are_allowed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("lists") / "list.csv"
    file.write_text(f"path\n{folder / 'p/b.png'}\n")
    assert (array(open_source(file).read(0)) == array(picture(1))).all()


def test_missing_repeated_and_empty_paths_are_skipped_and_reported(folder: Path) -> None:
    (folder / "list.csv").write_text('path,label\np/a.png,x\np/gone.png,x\np/a.png,y\n"",x\np,x\np/b.png,x\n')
    source = open_source(folder / "list.csv")
    assert source.keys == ("p/a.png", "p/b.png")
    assert [(one.key, one.reason) for one in source.skipped] == [
        ("p/gone.png", "cannot be found: No such file or directory"),
        ("row 4", "its 'path' is empty"),
        ("p", "is not a file"),
        ("p/a.png", "listed again in row 3; the first one counts"),
    ]
    assert source.remarks()[0].startswith("4 images cannot be used: 'p/gone.png: cannot be found")


def test_a_list_whose_files_are_all_missing_is_refused(folder: Path) -> None:
    (folder / "list.csv").write_text("path\nq/a.png\nq/b.png\n")
    with pytest.raises(NotFound, match=r"None of the 2 images .* below .*q/a.png.*Paths are relative"):
        open_source(folder / "list.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "file,label\na.png,1\n", r"columns 'file', 'label'; one must be called 'path'"),
        ("list.csv", "", "one must be called 'path'"),
        ("list.csv", "path,label\n", "has no rows"),
        ("list.csv", "path\na.png,1\n", "line 2 has 2 cells, the header has 1"),
        ("list.csv", 'path\n"a.png\n', "line 2: "),
        ("list.csv", "path,split\np/a.png,fold7\n", r"'fold7' in the column 'split'; allowed are"),
        ("list.jsonl", '{"path": "a"}\n{"path"\n', "line 2 is not JSON"),
        ("list.jsonl", "[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_malformed_list_is_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises((BadRequest, InvalidField), match=message):
        open_source(folder / name)


def test_a_list_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "list.csv").write_bytes("path\nhäuser.png\n".encode("latin1"))
    with pytest.raises(BadRequest, match="not UTF-8"):
        open_source(folder / "list.csv")


def test_damaged_parquet_is_refused(folder: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'train')")
    (folder / "list.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(BadRequest, match="cannot be read as Parquet"):
        open_source(folder / "list.parquet")


def test_parquet_without_pyarrow_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "list.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EmbedServeError, match=r"needs pyarrow: pip install 'embedserve\[train\]'"):
        open_source(folder / "list.parquet")


def test_cells_become_text() -> None:
    cells = ["a", "", 3, 3.0, 0.5, True, None, float("nan"), float("inf"), {"deep": 1}, [1]]
    assert [as_text(cell) for cell in cells] == [
        "a", None, "3", "3", "0.5", "True", None, None, None, None, None,
    ]  # fmt: skip
