"""Folders of images: with a `metadata.jsonl`, with a folder for each class, or bare."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# These are the usual suffixes of the files that `kdiffusion.images.reading` reads.
SUFFIXES = frozenset(
    ".avif .bmp .gif .heic .heif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tga .tif .tiff .webp"
    "".split()
)
METADATA = "metadata.jsonl"
MAX_LINE = 1_000_000  # bytes
_CAPTIONS = ("text", "caption")
_MAX_SHOWN = 5


class ImageFolder(Sequence):
    """The images of a folder, as a sequence of samples.

    Three layouts, those of Hugging Face's `imagefolder`:

    - with a file `metadata.jsonl`: each line is a JSON object with `file_name`, the path of an
      image inside the folder, and `text` or `caption`, `label`, or both. Other keys are ignored;
    - without it, but with folders of images: each folder is a class, in the order of their names;
    - images alone.

    Only the list is read here. A missing or damaged image is found when it is needed, see `Data`.

    Args:
        path: path of the folder.

    Attributes:
        rows: list of dictionaries, the samples without their images.
        classes: tuple of str, the names of the labels; empty if there are none or if they are
            numbers.

    Raises:
        ValueError: If there is no such folder, it fits none of the layouts, or a line of its
            metadata is wrong. The message names the line.

    Example:

    ```python
    folder = ImageFolder("flowers")
    folder[0]  # {"image": PosixPath("flowers/rose-1.jpg"), "caption": "a rose"}
    ```
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is no folder. Expected one with images.")
        self._root = self.path.resolve()
        self.classes: tuple[str, ...] = ()
        if (self.path / METADATA).is_file():
            self.rows = list(_metadata_rows(self.path / METADATA))
            self._names = [row.pop("file_name") for row in self.rows]
            self._name_labels()
        else:
            self._list()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):
        path = self.path / self._names[index]
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{str(path)!r} is a link that leads out of the folder")
        return {"image": path, **self.rows[index]}

    def _name_labels(self):
        """Number labels that are names, in the order of the names."""
        labels = {row["label"] for row in self.rows if "label" in row}
        if labels and all(isinstance(label, str) for label in labels):
            self.classes = tuple(sorted(labels))
            numbers = {name: number for number, name in enumerate(self.classes)}
            for row in self.rows:
                row["label"] = numbers[row["label"]]

    def _list(self):
        own, folders = _images(self.path), _subfolders(self.path)
        inside = {folder.name: list(_images_below(folder)) for folder in folders}
        classes = {name: paths for name, paths in inside.items() if paths}
        nested = [name for name in inside if (self.path / name / METADATA).is_file()]
        if nested or bool(own) == bool(classes):
            raise ValueError(_misfit(self.path, own, classes, nested))
        self.classes = tuple(classes)
        paths = own if own else [path for name in classes for path in classes[name]]
        self._names = [path.relative_to(self.path).as_posix() for path in paths]
        self.rows = [{} for _ in own]
        for number, members in enumerate(classes.values()):
            self.rows += [{"label": number} for _ in members]


def _misfit(path, own, classes, nested):
    if nested:
        return f"{METADATA} stands in {nested[0]!r} of {str(path)!r}: give that folder instead."
    if own:
        return (
            f"{str(path)!r} holds images ({own[0].name}) and folders of images "
            f"({next(iter(classes))}). Expected either, or a file {METADATA} that lists them."
        )
    return (
        f"{str(path)!r} holds no images. Expected a file {METADATA}, images "
        f"({', '.join(sorted(SUFFIXES))}), or a folder of images for each class."
    )


def _subfolders(folder):
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [
        Path(entry.path)
        for entry in entries
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    ]


def _images(folder: Path) -> list[Path]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [
        Path(entry.path)
        for entry in entries
        if entry.is_file()
        and not entry.name.startswith(".")
        and Path(entry.name).suffix.lower() in SUFFIXES
    ]


def _images_below(folder: Path) -> Iterator[Path]:
    yield from _images(folder)
    for inner in _subfolders(folder):
        yield from _images_below(inner)


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the checked lines of a metadata file: `file_name`, `caption`, `label`."""
    lines: dict[str, int] = {}
    columns = None
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            place = f"{path}, line {number}:"
            if not line.strip():
                continue
            row = _row(_parse(line, place), place)
            first = lines.setdefault(row["file_name"], number)
            if first != number:
                raise ValueError(
                    f"{place} {row['file_name']!r} stands in line {first} already. Expected one "
                    "line for each image."
                )
            found = {name: type(value).__name__ for name, value in row.items()}
            columns = columns or found
            if found != columns:
                raise ValueError(
                    f"{place} holds {_shown(found)}, the lines before {_shown(columns)}. "
                    "Expected the same in every line; a caption may be empty."
                )
            yield row
    if not lines:
        raise ValueError(f"{path} holds no lines. Expected one for each image.")


def _shown(columns):
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def _parse(line: bytes, place: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise ValueError(f"{place} is longer than {MAX_LINE:,} bytes.")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read as JSON in UTF-8: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} holds a {type(row).__name__}. Expected an object such as "
            '{"file_name": "1.jpg", "text": "a rose"}'
        )
    return row


def _row(row: dict[str, Any], place: str) -> dict[str, Any]:
    checked: dict[str, Any] = {"file_name": _file_name(row.get("file_name"), place)}
    captions = [row[name] for name in _CAPTIONS if row.get(name) is not None]
    if len(captions) == 2 and captions[0] != captions[1]:
        raise ValueError(f"{place} holds both text and caption, which differ. Expected one.")
    if captions:
        checked["caption"] = captions[0]
        if not isinstance(captions[0], str):
            raise ValueError(
                f"{place} the caption must be a text. Received: {type(captions[0]).__name__}"
            )
    label = row.get("label")
    if label is not None:
        checked["label"] = label
        number = isinstance(label, int) and not isinstance(label, bool)
        if not isinstance(label, str) and not (number and 0 <= label < 2**31):
            raise ValueError(
                f"{place} the label must be a name or a number from 0 on. Received: {label!r:.80}"
            )
    return checked


def _file_name(name: Any, place: str) -> str:
    """Return a path inside the folder; its text alone decides, the same on any system."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{place} `file_name` must be the path of an image. Received: {name!r:.80}"
        )
    parts = PurePosixPath(name).parts
    foreign = PureWindowsPath(name).anchor or "\\" in name or "\0" in name
    if foreign or not parts or parts[0] == "/" or ".." in parts or len(name) > 1024:
        raise ValueError(
            f"{place} `file_name` must be the path of an image inside the folder, with forward "
            f"slashes. Received: {name!r:.80}"
        )
    return PurePosixPath(name).as_posix()
