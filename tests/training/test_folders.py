"""Folders of pictures: three layouts, and metadata by strangers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdiffusion.training.data.folders import MAX_LINE, ImageFolder


def picture(path, colour=(200, 100, 50), size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def metadata(folder, *lines):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_captions_come_from_the_metadata(tmp_path):
    metadata(
        tmp_path,
        {"file_name": "b.png", "text": "a rose", "width": 6},
        "",
        {"file_name": "more/./a.png", "caption": "eine Blüte"},
    )
    folder = ImageFolder(tmp_path)
    assert list(folder) == [
        {"image": tmp_path / "b.png", "caption": "a rose"},
        {"image": tmp_path / "more" / "a.png", "caption": "eine Blüte"},
    ]
    assert folder.classes == ()


def test_labels_may_be_numbers_or_names(tmp_path):
    metadata(tmp_path, {"file_name": "a.png", "label": 7}, {"file_name": "b.png", "label": 0})
    assert [row["label"] for row in ImageFolder(tmp_path)] == [7, 0]
    names = [{"file_name": f"{n}.png", "label": name} for n, name in enumerate("cac")]
    metadata(tmp_path, *names)
    folder = ImageFolder(tmp_path)
    assert [row["label"] for row in folder] == [1, 0, 1]
    assert folder.classes == ("a", "c")


def test_each_folder_of_pictures_is_a_class(tmp_path):
    for name in ("tulip/2.PNG", "tulip/deep/1.png", "rose/1.jpg", ".hidden/1.png"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rose" / "notes.txt").write_text("no picture")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ("rose", "tulip")
    assert [(row["image"].name, row["label"]) for row in folder] == [
        ("1.jpg", 0),
        ("2.PNG", 1),
        ("1.png", 1),
    ]


def test_pictures_alone(tmp_path):
    for name in ("b.png", "a.png", ".c.png"):
        picture(tmp_path / name)
    assert list(ImageFolder(tmp_path)) == [{"image": tmp_path / n} for n in ("a.png", "b.png")]


def test_folders_that_fit_no_layout(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path)
    (tmp_path / "train").mkdir()
    metadata(tmp_path / "train", {"file_name": "a.png"})
    with pytest.raises(ValueError, match="metadata.jsonl stands in 'train'.*give that folder"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "metadata.jsonl").unlink()
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"images \(b.png\) and folders of images \(train\)"):
        ImageFolder(tmp_path)


GOOD = '{"file_name": "a.png", "text": "a rose"}'


@pytest.mark.parametrize(
    "line, message",
    [
        *[
            (json.dumps({"file_name": name, "text": ""}), "line 2: `file_name` must be the path")
            for name in (
                *("/etc/passwd", "../a.png", "b/../../a.png", "C:/a.png", "c:a.png"),
                *("b\\..\\a.png", "//host/a.png", "a\0.png", "", ".", "x" * 2000, None, 3, ["a"]),
            )
        ],
        ('{"text": "a rose"}', "line 2: `file_name` must be the path"),
        ('{"file_name": "./a.png", "text": ""}', "'a.png' stands in line 1 already"),
        ('{"file_name": "b.png", "text": 3}', "line 2: the caption must be a text.*int"),
        ('{"file_name": "b.png", "text": ["a"]}', "line 2: the caption must be a text.*list"),
        ('{"file_name": "b.png", "text": "a", "caption": "b"}', "both text and caption"),
        ('{"file_name": "b.png"}', r"holds file_name \(str\), the lines before .*caption"),
        ('{"file_name": "b.png", "text": "", "label": 1}', r"label \(int\), the lines before"),
        ('{"file_name": "b.png", "text": "", "label": -1}', "line 2: the label must be a name"),
        ('{"file_name": "b.png", "text": "", "label": true}', "line 2: the label must be a name"),
        ('{"file_name": "b.png", "text": "", "label": 1e3}', "line 2: the label must be a name"),
        (f'{{"label": {2**31}, "file_name": "b.png"}}', "line 2: the label must be a name"),
        ('["b.png", "a rose"]', "line 2: holds a list"),
        ("null", "line 2: holds a NoneType"),
        ('{"file_name": "b.png", "text": "a rose"', "line 2: cannot be read as JSON"),
        ("[" * 100_000, "line 2: cannot be read as JSON"),
        ('{"label": ' + "9" * 10_000 + "}", "line 2: cannot be read as JSON"),
        (json.dumps({"file_name": "b.png", "text": "x" * MAX_LINE}), "longer than 1,000,000"),
    ],
)
def test_metadata_by_strangers(tmp_path, line, message):
    metadata(tmp_path, GOOD, line)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path)


def test_metadata_that_is_no_text(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.png"}\n')
    with pytest.raises(ValueError, match="line 1: cannot be read as JSON in UTF-8"):
        ImageFolder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="holds no lines"):
        ImageFolder(tmp_path)
    marked = b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n"  # as Windows' editors write it
    (tmp_path / "metadata.jsonl").write_bytes(marked)
    assert ImageFolder(tmp_path)[0]["caption"] == "a rose"


def test_long_lines_are_read_up_to_the_limit(tmp_path):
    caption = "x" * (MAX_LINE - 100)
    metadata(tmp_path, {"file_name": "b.png", "text": caption})
    assert ImageFolder(tmp_path)[0]["caption"] == caption


def test_a_link_may_not_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.png")
    inside = tmp_path / "data"
    picture(inside / "a.png")
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "in.png").symlink_to("a.png")
    metadata(inside, *({"file_name": f"{name}.png"} for name in ("a", "in", "out")))
    folder = ImageFolder(inside)
    assert np.asarray(Image.open(folder[1]["image"])).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="a link that leads out of the folder"):
        folder[2]
    moved = tmp_path / "link"
    moved.symlink_to(inside)  # the folder itself may be one
    assert ImageFolder(moved)[0]["image"] == Path(moved / "a.png")
