from __future__ import annotations

import json
import os
import re
import sys
import unicodedata

import pytest
import torch
from PIL import Image

from pgp.datasets.manifest import Manifest
from pgp.datasets.own import dataset_from_path
from pgp.system import platforms


def table(folder, text, name="photos.csv", encoding="utf-8"):
    """A table of images; every image that it names as a.png, b.png and so on is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(re.findall(r"[\w /ü]+\.png", text)):
        place = folder / path.strip()
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (9, 8, 7)).save(place)
    (folder / name).write_text(text, encoding=encoding)
    return Manifest(folder / name)


SPLIT = "path,label,split\na.png,dog,train\nb.png,cat,train\nc.png,dog,test\nd.png,cat,test\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_in_its_order(tmp_path, encoding):
    text = 'Label , path,split,who\ndog,my photos/ü 1.png,train,x\n\n"cat, big",b.png,Train,y\ndog,c.png,TEST,z\n'
    data = table(tmp_path, text, encoding=encoding).build()
    assert data.class_names == ("dog", "cat, big")
    assert [path.name for path in data.train.paths] == ["ü 1.png", "b.png"]
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1], [0])
    assert data.train.image(0)[:, 0, 0].tolist() == [9, 8, 7]
    assert (data.tasks, data.domains, data.train.domains) == ((), (), None)


def test_blanks_after_commas(tmp_path):
    data = table(tmp_path, 'path, label\na.png, cat\nb.png, "cat, big"\n').build()
    assert data.class_names == ("cat", "cat, big")


def test_other_columns_are_ignored(tmp_path):
    data = table(tmp_path, "path,label,mask,main,flask\na.png,cat,1,1,1\nb.png,cat,2,2,2\n").build()
    assert (data.tasks, data.domains) == ((), ())


def test_tabs_and_json_lines_say_the_same(tmp_path):
    comma = table(tmp_path, SPLIT).build()
    tabs = table(tmp_path, SPLIT.replace(",", "\t"), "photos.TSV").build()
    head, *rows = [line.split(",") for line in SPLIT.splitlines()]
    lines = "".join(json.dumps(dict(zip(head, row, strict=True))) + "\n\n" for row in rows)
    json_lines = table(tmp_path, lines, "photos.jsonl").build()
    for other in (tabs, json_lines):
        assert other.class_names == comma.class_names
        assert (other.train.paths, other.test.paths) == (comma.train.paths, comma.test.paths)
        assert torch.equal(other.train.labels, comma.train.labels)


def test_whole_numbers_come_in_their_order(tmp_path):
    lines = [{"path": f"{i}.png", "label": label, "task": label // 6} for i, label in enumerate([10, 9, 2, 10, 9, 2])]
    data = table(tmp_path, "\n".join(map(json.dumps, lines)), "x.jsonl").build()
    assert data.class_names == ("2", "9", "10")
    assert data.tasks == (("0", ("2",)), ("1", ("9", "10")))


def test_without_a_split_some_of_each_class_are_kept_for_the_test(tmp_path):
    text = "path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(20))
    data = table(tmp_path, text).build()
    assert (len(data.train), torch.bincount(data.test.labels).tolist()) == (16, [2, 2])
    assert not {*data.train.paths} & {*data.test.paths}
    assert table(tmp_path, text).build().test.paths == data.test.paths
    other = Manifest(tmp_path / "photos.csv", test_share=0.3, split_seed=1).build()
    assert torch.bincount(other.test.labels).tolist() == [3, 3]


def test_domains_and_tasks(tmp_path):
    text = "path,label,task,domain\n" + "".join(
        f"{i}.png,{('dog', 'cat')[i % 2]},{('first', 'second')[i % 2]},{('photo', 'art')[i // 6]}\n" for i in range(12)
    )
    data = table(tmp_path, text).build()
    assert data.domains == ("photo", "art")
    assert data.tasks == (("first", ("dog",)), ("second", ("cat",)))
    assert torch.bincount(data.test.labels + 2 * data.test.domains).tolist() == [1, 1, 1, 1]
    only_tasks = table(tmp_path, text.replace(",domain", ",author")).build()
    assert only_tasks.domains == ("first", "second")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected rows of images in .*photos.csv, got none"),
        ("path,label\n", "expected rows of images"),
        ("path;label\na.png;dog\n", r"expected columns path and label .* in line 1 of .*, got \['path;label'\]"),
        ("file,label\na.png,dog\n", "expected columns path and label"),
        ("path,label,label\na.png,dog,cat\n", "expected each column once in line 1"),
        ("path,label,spilt\na.png,dog,test\n", "unknown column 'spilt' in line 1 .*perhaps you meant 'split'"),
        ("path,label,tsak\na.png,dog,1\n", "unknown column 'tsak' in line 1 .*perhaps you meant 'task'"),
        ("path,label\na.png,dog\nb.png\n", r"expected 2 fields in line 3 of .*, got 1: \['b.png'\]"),
        ("path,label\na.png,dog\nb.png, \n", "expected a path and a label in line 3"),
        ("path,label,split\na.png,dog,train\nb.png,dog,val\n", "expected split train or test in line 3 .*got 'val'"),
        ("path,label,split\na.png,dog,train\nb.png,dog,\n", "to fill the same of split and domain, got .* in line 3"),
        ("path,label,domain\na.png,dog,\nb.png,dog,x\n", r"got \['domain'\] in line 3 and \[\] in the first row"),
        ("path,label,split\na.png,dog,train\nb.png,dog,train\n", "expected rows with split test"),
        ("path,label,split\na.png,dog,train\nb.png,cat,test\n", r"every class in .*got \['cat'\] in test only"),
        ("path,label\na.png,dog\nb.png,dog\na.png,dog\n", "every image once in .*'a.png' in lines 2 and 4$"),
        (SPLIT + "x/../a.png,dog,test\n", "in lines 2 and 6 and in both parts, so that a test"),
        ('path,label\n"a.png,dog\n', "cannot read line 2 of .*photos.csv: unexpected end of data"),
        ('path,label\na.png,"dog\nb.png,dog\nc.png,dog\n', "read line 2 of .*; look whether its quotes are closed"),
        ('path,label\na.png,"big\ndog"\nb.png,"dog\nc.png,"dog"\n', "cannot read line 4 of "),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        table(tmp_path, text).build()


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_one_image_by_two_paths_is_not_in_both_parts(tmp_path):
    data = table(tmp_path, SPLIT)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "photos.csv").write_text(SPLIT + "again/a.png,dog,test\n")
    with pytest.raises(ValueError, match=r"the same file as 'a\.png' in line 2 and 'again/a\.png' in line 6"):
        data.build()
    (tmp_path / "photos.csv").write_text(SPLIT + "again/a.png,dog,train\n")
    assert len(data.build().train) == 3


SOUND = '{"path": "a.png", "label": "x"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.png"}\n', r"expected columns path and label .* in line 1 of .*, got \['path'\]"),
        ('{"path": "a.png", "label": "x"}\n[1]\n', r"expected a JSON object in line 2 of .*, got \[1\]"),
        ('{"path": "a.png", "label": "x"}\n{"path"\n', "expected a JSON object in line 2 of .*: "),
        ('{"path": "a.png", "label": true}\n', "expected a text or a whole number as label in line 1 of .*, got True"),
        ('{"path": "a.png", "label": null}\n', "expected a path and a label in line 1"),
        (f'{SOUND}{{"path": "b\\u0000.png", "label": "x"}}', r"without the zero character in line 2 of .*b\\x00"),
        (f'{SOUND}{{"path": "b.png", "label": "x\\u0000"}}', r"without the zero character in line 2 of .*x\\x00"),
        (f'{SOUND}{{"path": "\\ud800.png", "label": "x"}}', r"1 of the 2 images of .* do not exist, such as"),
        ('{"path": ' + "[" * 100_000, "expected a JSON object in line 1 of .*: maximum recursion"),
    ],
)
def test_json_lines_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, text, "photos.jsonl").build()


def test_missing_files_are_named(tmp_path):
    manifest = table(tmp_path, SPLIT)
    for name in ("a", "d"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=rf"2 of the 4 images of .* \['a.png', 'd.png'\]; paths .* from {tmp_path}"):
        manifest.build()
    with pytest.raises(ValueError, match=r"no table of images at .*nowhere.csv: name another"):
        Manifest(tmp_path / "nowhere.csv").build()
    table(tmp_path, "path,label\na.png,gr\u00fcn\n", encoding="latin-1")
    with pytest.raises(ValueError, match="in UTF-8, got another encoding at byte 19"):
        manifest.build()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_paths_that_are_no_files(tmp_path):
    manifest = table(tmp_path, SPLIT)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    (tmp_path / "c.png").unlink()
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(
        ValueError, match=r"3 of the 4 images of .* are no files, but folders, pipes or broken links, such"
    ):
        manifest.build()
    for name in ("photos.csv", "photos.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=r"cannot read the table of images .*photos.* got a folder"):
            Manifest(tmp_path / name).build()


@pytest.mark.parametrize(("table_form", "disk_form"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_are_the_same_in_every_unicode_form(tmp_path, table_form, disk_form):
    folder = tmp_path / unicodedata.normalize(disk_form, "café")
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (5, 4), (9, 8, 7)).save(folder / unicodedata.normalize(disk_form, f"é{i}.png"))
    forms = [table_form, "NFC", "NFD", "NFC"]
    rows = [unicodedata.normalize(form, f"café/é{i}.png,é,ü") for i, form in enumerate(forms)]
    (tmp_path / "photos.csv").write_text("path,label,task\n" + "\n".join(rows), encoding="utf-8")
    data = Manifest(tmp_path / "photos.csv").build()
    assert (data.class_names, data.tasks) == (("é",), (("ü", ("é",)),))
    assert data.train.image(0).shape == (3, 4, 5)
    with (tmp_path / "photos.csv").open("a", encoding="utf-8") as file:
        file.write(unicodedata.normalize("NFD", "\ncafé/é0.png,é,ü\n"))
    with pytest.raises(ValueError, match=r"every image once in .* in lines 2 and 6"):
        Manifest(tmp_path / "photos.csv").build()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SPLIT.encode("utf-16"), "cannot read the table of images .*photos.csv as a text in UTF-8, got UTF-16"),
        (SPLIT.replace("dog", "d\0g").encode(), "it holds a zero byte, in line 2"),
        (
            "path,label\na.png,gr\u00fcn\n".encode("latin-1"),
            "got another encoding at byte 19, in line 2: save it as UTF",
        ),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    (tmp_path / "photos.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Manifest(tmp_path / "photos.csv").build()


def test_what_data_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path, SPLIT)
    (tmp_path / "photos.zip").write_bytes(b"")
    assert dataset_from_path("photos.csv").with_absolute_paths() == Manifest(tmp_path / "photos.csv")
    with pytest.raises(
        ValueError, match=r"folder of images, a table of them \(.csv, .jsonl, .tsv\) or hf:NAME as data"
    ):
        dataset_from_path("photos.zip")
    with pytest.raises(ValueError, match="test_share between 0 and 1, got 1"):
        Manifest(test_share=1)
