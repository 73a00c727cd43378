"""Models of the Hugging Face hub: fetched once, verified, and kept in the hub's own cache.

Address, token, cache and offline mode are huggingface_hub's, with its environment variables:
HF_ENDPOINT, HF_TOKEN, HF_HOME or HF_HUB_CACHE, HF_HUB_OFFLINE. Its own downloads compare no more
than sizes, and begin anew after an interruption. Here a file is written beside the cache's other
files, goes on where it was cut off, also in another process, and gets its name in the cache once
its bytes have the digest that the hub announced.

The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from kdiffusion.files import file_sha256, replacing
from kdiffusion.weights.hub_errors import (
    WAITS,
    Address,
    DownloadError,
    Unreachable,
    explained,
    kind_of,
    patiently,
    status_of,
)
from weights_conversion import (
    INDEX,
    CheckpointError,
    CheckpointMismatch,
    DiffusersFolder,
    select,
    terms,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!.*\.\.)[\w.][\w./-]*")
_NOTHING_TO_GO_ON_WITH = 416  # https://www.rfc-editor.org/rfc/rfc9110#status.416
_PAGE = (b"<!doctype html", b"<html")


class Snapshot(NamedTuple):
    """A model in the cache.

    Attributes:
        path: a folder in diffusers' layout.
        variant: that of its weights, such as "fp16"; None for those without one.
    """

    path: Path
    variant: str | None


class _File(NamedTuple):
    """A file as the hub announces it, its digest git's SHA-1 or the SHA-256 of large files."""

    name: str
    size: int
    digest: str


def fetch(repository: str, revision: str | None = None, licence: str | None = None) -> Snapshot:
    """Find a model of the hub in the cache, or fetch the files that it needs into it.

    Needed are the configs, the tokenizer, and one set of weights: safetensors files before `.bin`
    files, those without a variant before any variant. README and licence come with them; the
    licence is named in a warning when a download begins.

    Without a network a model that is complete in the cache is used; in offline mode no connection
    is even tried.

    Args:
        repository: such as "stable-diffusion-v1-5/stable-diffusion-v1-5".
        revision: branch, tag or commit; None for the main branch. A commit never changes, so the
            hub is not asked about one that is complete in the cache.
        licence: name of the licence of the weights; None for what the repository says.

    Returns:
        A `Snapshot`: the folder in the cache, and the variant of its weights.

    Raises:
        DownloadError: a `ValueError`, if the model is neither in the cache nor to be had.

    Example:

    >>> path, variant = fetch("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> (path / "model_index.json").is_file()
    True
    """
    from huggingface_hub import constants

    revision = revision or constants.DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):  # it becomes the name of a file
        raise DownloadError(f"A revision is a branch, tag or commit. Received: {revision!r}")
    source = Address(repository, revision, Path(constants.HF_HUB_CACHE))
    cached, missing = _cached(source)
    if cached and (constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(source.revision)):
        return cached
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{repository!r} is not complete in {source.cache}: {missing}. It is not fetched, "
            "because HF_HUB_OFFLINE is set: unset it and try again, or name a folder."
        )
    try:
        info = patiently(source, lambda: _ask(source), WAITS[:1] if cached else WAITS)
    except Unreachable as error:
        if cached is None:
            raise
        warnings.warn(f"{error} The copy in the cache is used.", stacklevel=2)
        return cached
    try:
        return _complete(source, info, licence)
    except OSError as error:
        raise explained(source, error) from error


def _cached(source: Address) -> tuple[Snapshot | None, str]:
    """Find a complete model in the cache, or say what is missing, without a connection."""
    reference = source.folder / "refs" / source.revision
    commit = reference.read_text() if reference.is_file() else source.revision
    folder = source.folder / "snapshots" / commit
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        # The index knows of parts that an interrupted download has not begun.
        index = DiffusersFolder(folder).index if INDEX in names else {}
        return Snapshot(folder, select(names, index).variant), ""
    except CheckpointError as error:
        return None, str(error)


def _ask(source: Address) -> Any:
    """Ask the hub for a revision's commit, licence, and files with sizes and digests."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(
        source.name,
        revision=source.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    if not _COMMIT.fullmatch(info.sha or ""):  # it becomes the name of a folder
        raise ValueError(f"a commit of {info.sha!r}")
    return info


def _complete(source: Address, info: Any, licence: str | None) -> Snapshot:
    """Fetch the files of a commit that the cache lacks."""
    files = {file.name: file for file in map(_file, info.siblings)}
    try:
        selection = select(files)
    except CheckpointMismatch as error:
        raise DownloadError(
            f"{source.name!r} is no model in diffusers' layout that can be loaded: {error}. If it "
            "holds a single .safetensors or .ckpt file, download that and pass its path."
        ) from error
    snapshot = source.folder / "snapshots" / info.sha
    needed = [files[name] for name in [*terms(files), *selection.names]]
    absent = [file for file in needed if not _has_size(snapshot / file.name, file.size)]
    if absent:
        total = sum(file.size for file in absent)
        _check_space(source, total)
        licence = licence or getattr(info.card_data, "license", None) or "not told"
        warnings.warn(
            f"Fetching {source.name}, {total / 1e6:,.0f} MB, into {snapshot}. Licence of the "
            f"weights: {licence}; its terms are kept there, in {', '.join(terms(files))}.",
            stacklevel=3,
        )
    for file in sorted(absent, key=lambda file: file.size):
        _fetch_file(source, info.sha, file)
    if source.revision != info.sha:
        _write_reference(source.folder / "refs" / source.revision, info.sha)
    return Snapshot(snapshot, selection.variant)


def _file(sibling: Any) -> _File:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest or "") or sibling.size is None:
        raise DownloadError(
            f"The hub tells no size or digest of {sibling.rfilename!r}, so it cannot be verified. "
            "Download the folder by hand and name it."
        )
    return _File(sibling.rfilename, sibling.size, digest)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_space(source: Address, needed: int) -> None:
    place = next(p for p in (source.folder, *source.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")


def _fetch_file(source: Address, commit: str, file: _File) -> None:
    """Fetch one file into the cache, verified."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    blob = source.folder / "blobs" / file.digest
    partial = blob.with_name(f"{blob.name}.incomplete")  # as huggingface_hub called it until 1.x
    lock = source.cache / ".locks" / source.folder.name / f"{file.digest}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(source.name, file.name, revision=commit)
    with WeakFileLock(lock):
        damage = _damage(blob, file) if blob.exists() else "it is absent"
        for _ in range(2):
            if damage:
                patiently(source, lambda: _transfer(source, url, partial, file))
                if damage := _damage(partial, file):
                    partial.unlink()
                else:
                    partial.replace(blob)
        if damage:
            raise DownloadError(
                f"{file.name} of {source.name!r} came damaged, twice: {damage}. Nothing of it is "
                "kept. Try again later, or from another network."
            )
        _link(blob, source.folder / "snapshots" / commit / file.name)


class _Bounded(io.BufferedWriter):
    """A file that grows to the announced size and no further, whatever the server sends."""

    def __init__(self, path: Path, size: int):
        super().__init__(io.FileIO(path, "ab"))
        self.size = size

    def write(self, content: Any) -> int:
        if self.tell() + len(content) > self.size:
            raise OSError("more bytes came than were announced")
        return super().write(content)


def _transfer(source: Address, url: str, partial: Path, file: _File) -> None:
    """Receive a file, or the rest of it, without a look at its digest."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    with _Bounded(partial, file.size) as stream:
        if stream.tell() == file.size:
            return
        try:
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                # A part of a compressed answer would be no part of the file.
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.name,
            )
        except Exception as error:  # which ones there are differs with huggingface_hub's version
            other_size = type(error) is OSError and error.errno is None
            if other_size or status_of(error) == _NOTHING_TO_GO_ON_WITH:
                return
            if kind_of(error) == "network":  # it has tried to go on, as often as makes sense
                raise explained(source, error) from error
            raise


def _damage(path: Path, file: _File) -> str | None:
    """Describe the damage of a file; None if its bytes are those of the hub."""
    size = path.stat().st_size
    if size == file.size and _digest(path, file) == file.digest:
        return None
    with path.open("rb") as stream:
        if stream.read(64).lstrip().lower().startswith(_PAGE):
            return "a web page came instead, perhaps the login page of a network or proxy"
    if size != file.size:
        return f"{size:,} of {file.size:,} bytes"
    return "its digest is not the one that the hub announced"


def _digest(path: Path, file: _File) -> str:
    """Compute the digest of a file, of the kind that the hub announced."""
    if len(file.digest) == 64:
        return file_sha256(path)
    # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    content = f"blob {file.size}\0".encode() + path.read_bytes()
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    """Give a file its name in a snapshot."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # no links on this disk, or on Windows
        blob.replace(pointer)


def _write_reference(reference: Path, commit: str) -> None:
    if reference.is_file() and reference.read_text() == commit:
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    with replacing(reference) as partial:
        partial.write_text(commit)
