"""CLIP's vocabulary: its bytes, its merges, and the files that hold them."""

from __future__ import annotations

import gzip
import heapq
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kdiffusion.files import file_sha256

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
MAX_LENGTH = 77

PATH_VARIABLE = "KDIFFUSION_CLIP_VOCAB"
# KerasCV has the same name, address and digest, so a vocabulary in its cache is found.
NAME = "bpe_simple_vocab_16e6.txt.gz"
URL = f"https://github.com/openai/CLIP/blob/main/clip/{NAME}?raw=true"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# That file lists 262,144 merges; CLIP was trained with the first 49152 - 256 - 2.
NUM_MERGES = 48_894
MAX_FILE_BYTES = 1 << 26

Merges = tuple[tuple[str, str], ...]
T = TypeVar("T")


def _byte_symbols() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + n) for n, byte in enumerate(others)}


# A printable character stands for each byte (GPT-2; Radford et al. 2019), in the order of ids.
BYTE_SYMBOLS = _byte_symbols()
SYMBOL_BYTES = {symbol: bytes([byte]) for byte, symbol in BYTE_SYMBOLS.items()}
ALPHABET = (*SYMBOL_BYTES, *(symbol + WORD_END for symbol in SYMBOL_BYTES))


class FolderVocabulary(NamedTuple):
    """The content of the `tokenizer/` folder of a checkpoint.

    Args:
        ids: dictionary from trained and added tokens to their ids.
        merges: pairs of symbols, in the order in which they are merged.
        added: the added tokens, in the order of their ids.
        pad_id: int, id that fills rows.
        unknown_id: int, id of bytes that `ids` lacks; `None` if it holds all.
        max_length: int, number of ids in a row.
    """

    ids: dict[str, int]
    merges: Merges
    added: tuple[str, ...]
    pad_id: int
    unknown_id: int | None
    max_length: int


def trained_ids(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Number bytes, merged symbols and the two special tokens, as OpenAI's tokenizer does."""
    tokens = [*ALPHABET, *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def merge(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge the pair of the lowest rank wherever it occurs, left to right, until none is left.

    Sennrich et al. 2016, algorithm 1, in O(n log n). It keeps a list of neighbours, and for each
    pair the places where it was seen. A place is checked again before it is merged, because the
    pair may be gone.

    Args:
        symbols: list of symbols, which is changed.
        ranks: rank of each pair that is merged; the lowest first.

    Returns:
        List of the merged symbols.
    """
    size = len(symbols)
    before, after = list(range(-1, size - 1)), list(range(1, size + 1))
    places: dict[tuple[str, str], list[int]] = {}
    queue: list[tuple[int, tuple[str, str]]] = []

    def see(place):
        if place < 0 or after[place] == size:
            return
        pair = symbols[place], symbols[after[place]]
        if pair in places:
            places[pair].append(place)
        elif pair in ranks:
            places[pair] = [place]
            heapq.heappush(queue, (ranks[pair], pair))

    for place in range(size):
        see(place)
    while queue:
        _, pair = heapq.heappop(queue)
        merged = []
        for place in sorted(places.pop(pair)):
            other = after[place]
            if other == size or (symbols[place], symbols[other]) != pair:
                continue
            symbols[place], symbols[other] = "".join(pair), ""
            after[place] = after[other]
            if after[other] < size:
                before[after[other]] = place
            merged.append(place)
        for place in merged:
            see(before[place])
            see(place)
    return [symbol for symbol in symbols if symbol]


def check_vocabulary(
    ids: Mapping[str, int], merges: Sequence[tuple[str, str]], needs_bytes: bool = True
) -> None:
    """Check that every text encodes to ids from 0 to n - 1.

    Args:
        ids: mapping from token to id.
        merges: pairs of symbols.
        needs_bytes: bool, whether `ids` must hold all bytes.

    Raises:
        ValueError: If ids are missing or shared, or a merge has no token.
    """
    if any(not isinstance(index, int) for index in ids.values()):
        raise ValueError("ids must be integers")
    holders = {index: token for token, index in ids.items()}
    if holders.keys() != set(range(len(ids))):
        twice = [token for token, index in ids.items() if holders[index] != token]
        raise ValueError(
            f"{len(ids)} tokens must have the ids 0 to {len(ids) - 1}, each once. Received: "
            f"{min(holders, default=None)} to {max(holders, default=None)}, "
            f"shared by: {_some(twice)}"
        )
    needed = [START, END, *(ALPHABET if needs_bytes else ())]
    for first, second in merges:
        needed += [first, second, first + second]
    if missing := [token for token in needed if token not in ids]:
        raise ValueError(f"the vocabulary lacks {_some(missing)}")
    if len(set(merges)) < len(merges):
        raise ValueError(f"{len(merges) - len(set(merges))} merges are listed twice")


def read_bpe(path: str | os.PathLike) -> Merges:
    """Read the merges of OpenAI's bpe_simple_vocab_16e6.txt.gz, as many as CLIP uses."""
    merges = _read(Path(path), _parse_merges, gzip.open)[:NUM_MERGES]
    if not merges:
        raise ValueError(f"{path} is empty. Fetch it again.")
    return merges


def read_folder(folder: Path) -> FolderVocabulary:
    """Read tokenizer.json, or else vocab.json and merges.txt, with the settings beside them.

    tokenizer.json comes first, as in transformers: it is complete, and transformers 5 writes no
    other. Paths that are named inside the files are not opened.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    settings = _read_settings(folder, names)
    if "tokenizer.json" in names:
        source = folder / "tokenizer.json"
        trained, merges, listed = _read(source, _parse_tokenizer)
    elif names.isdisjoint(("vocab.json", "merges.txt")):
        raise ValueError(
            f"{folder} must hold a tokenizer.json, or a vocab.json and a merges.txt. "
            f"Received: {_some(sorted(names))}"
        )
    else:
        source = folder / "vocab.json"
        trained = _read(source, _parse_object)
        merges = _read(folder / "merges.txt", _parse_merges)
        listed = settings.get("added_tokens_decoder", {})
        if "added_tokens_decoder" not in settings and "added_tokens.json" in names:
            listed = _read(folder / "added_tokens.json", _parse_object)
    added = {token: index for token, index in listed.items() if token not in trained}
    try:
        return _folder_vocabulary(trained, merges, added, settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}. Fetch the tokenizer folder again.") from error


def write_folder(folder: Path, vocabulary: FolderVocabulary) -> None:
    """Write vocab.json, merges.txt and settings, as transformers' CLIPTokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    # Readers prefer this file, so an old one would hide those that are written here.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokens = {index: token for token, index in vocabulary.ids.items()}
    roles = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END if vocabulary.unknown_id is None else tokens[vocabulary.unknown_id],
        "pad_token": tokens[vocabulary.pad_id],
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": vocabulary.max_length}
    added = {token: vocabulary.ids[token] for token in vocabulary.added}
    trained = {token: index for token, index in vocabulary.ids.items() if token not in added}
    merges = "".join(f"{first} {second}\n" for first, second in vocabulary.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8", newline="\n")
    for name, content in (
        ("vocab.json", trained),
        ("added_tokens.json", added),
        ("special_tokens_map.json", roles),
        ("tokenizer_config.json", settings | roles),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8", newline="\n")


def local_vocabulary() -> str | None:
    """Return the path of OpenAI's vocabulary where `find_vocabulary` looks, without a download.

    Returns:
        The path, or `None` if the file is not on this machine.
    """
    if path := os.environ.get(PATH_VARIABLE):
        return path if os.path.isfile(path) else None
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    cached = Path(home, "datasets", NAME)
    if not cached.is_file() or file_sha256(cached) != SHA256:
        return None
    return str(cached)


def find_vocabulary() -> str:
    """Return the path of OpenAI's vocabulary: the file in KDIFFUSION_CLIP_VOCAB, or a download.

    The variable comes first, so with it no network is needed. The download is kept in Keras's cache
    (KERAS_HOME) and verified by its SHA-256 whenever it is used.

    Returns:
        The path.

    Raises:
        ValueError: If the variable names no file, or the download failed.
    """
    if path := os.environ.get(PATH_VARIABLE):
        if not os.path.isfile(path):
            raise ValueError(f"{PATH_VARIABLE} must name {NAME}. No such file: {path!r}")
        return path
    import keras  # this takes seconds, and most tokenizers come from a folder

    try:
        return keras.utils.get_file(NAME, URL, file_hash=SHA256)
    # Keras raises a bare Exception if the address cannot be fetched.
    except Exception as error:
        raise ValueError(
            f"CLIP's vocabulary could not be fetched from {URL}: {error} "
            f"Without a network, set {PATH_VARIABLE} to the path of a copy of {NAME}."
        ) from error


def _read(path: Path, parse: Callable[[str], T], opener: Callable = open) -> T:
    """Parse a text file; raise a ValueError that names it if anything is wrong with it."""
    try:
        with opener(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it holds more than {MAX_FILE_BYTES} bytes")
        return parse(content.decode("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing. Fetch it again.") from error
    except (
        AttributeError,
        EOFError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        gzip.BadGzipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{path} is malformed ({type(error).__name__}: {error}). Fetch it again."
        ) from error


def _parse_merges(text: str) -> Merges:
    lines = text.splitlines()
    first = 1 if lines and "#version" in lines[0] else 0
    return tuple(_pair(line.split(" ")) for line in lines[first:])


def _pair(symbols: Sequence[str]) -> tuple[str, str]:
    if len(symbols) != 2 or not all(isinstance(symbol, str) and symbol for symbol in symbols):
        raise ValueError(f"a merge must be two symbols. Received: {symbols!r:.60}")
    return symbols[0], symbols[1]


def _parse_object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object. Received: {type(content).__name__}")
    return content


def _parse_tokenizer(text: str) -> tuple[dict[str, int], Merges, dict[str, int]]:
    """Return the trained ids, the merges and the listed tokens of a tokenizer.json."""
    content = _parse_object(text)
    model = content["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise ValueError(f"`model.type` must be 'BPE', as CLIP's is. Received: {kind!r}")
    # The tokenizers library writes "a b" before version 0.20, and ["a", "b"] since.
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    listed = {_content(token): token["id"] for token in content.get("added_tokens", ())}
    return dict(model["vocab"]), tuple(_pair(pair) for pair in merges), listed


def _parse_config(text: str) -> dict[str, Any]:
    """Parse a tokenizer_config.json or special_tokens_map.json; its tokens become strings."""
    content = _parse_object(text)
    if (listed := content.get("added_tokens_decoder")) is not None:
        content["added_tokens_decoder"] = {
            _content(token): int(index) for index, token in listed.items()
        }
    for role in ("pad_token", "unk_token"):
        if (token := content.pop(role, None)) is not None:
            content[role] = _content(token)
    return content


def _content(token: Any) -> str:
    """Return a token, which is a string or a record of the tokenizers library."""
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"a token must be a string. Received: {content!r:.40}")
    return content


def _read_settings(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """Read tokenizer_config.json and, over it, special_tokens_map.json, as in transformers.

    The Stable Diffusion 2 folders name their pad token in the map. A config that lists its tokens
    (transformers since 4.34) is used alone.
    """
    config, roles = (
        _read(folder / name, _parse_config) if name in names else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    return config if "added_tokens_decoder" in config else config | roles


def _folder_vocabulary(
    trained: dict[str, int], merges: Merges, added: dict[str, int], settings: Mapping[str, Any]
) -> FolderVocabulary:
    """Make the vocabulary of a folder, after checking its parts against one another."""
    ids = trained | added
    pad_token, unknown = (settings.get(role, END) for role in ("pad_token", "unk_token"))
    check_vocabulary(ids, merges, needs_bytes=unknown not in trained)
    made = {START, END, unknown, pad_token, *ALPHABET, *map("".join, merges)}
    # A merges file that was cut short would encode to other ids than those of training.
    if unmade := [token for token in trained if token not in made]:
        raise ValueError(f"merges are missing: none makes {_some(unmade)}")
    if any(index < len(trained) for index in added.values()):
        raise ValueError("the ids of added tokens must follow those of the vocabulary")
    if pad_token not in ids:
        raise ValueError(f"the vocabulary lacks the pad token {pad_token!r}")
    # transformers writes 1e30 if there is no limit.
    length = settings.get("model_max_length")
    return FolderVocabulary(
        ids=ids,
        merges=merges,
        added=tuple(sorted(added, key=lambda token: added[token])),
        pad_id=ids[pad_token],
        unknown_id=None if ids.keys() >= set(ALPHABET) else ids[unknown],
        max_length=length if isinstance(length, int) and 2 <= length <= 10_000 else MAX_LENGTH,
    )


def _some(items: Sequence) -> str:
    shown = ", ".join(repr(item) for item in items[:5])
    return f"{shown} … ({len(items)} in all)" if len(items) > 5 else shown or "none"
