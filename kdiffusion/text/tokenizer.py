"""CLIP's byte-pair tokenizer: prompts to rows of token ids.

It has two stages: `clean` (repair, unescape, fold whitespace, lower the case) and the byte-pair
encoding of words. Both equal OpenAI's (Radford et al. 2021; github.com/openai/CLIP,
clip/simple_tokenizer.py) for every text. Transformers' tokenizer differs from both:
- it does not unescape HTML, nor repair mojibake (only version 4's slow form does);
- it finds `<|endoftext|>` within a run of punctuation, OpenAI's only at the start of a word;
- it takes the pad token of the Stable Diffusion 2 folders, "!", for a special token wherever a
  prompt holds it: id 0, where OpenAI and OpenCLIP give 256;
- it splits words with case ("'ſ" is no "'s") and by another release of Unicode.
"""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex

from kdiffusion.text import vocabulary as files
from kdiffusion.text.vocabulary import (
    BYTE_SYMBOLS,
    END,
    MAX_LENGTH,
    START,
    SYMBOL_BYTES,
    WORD_END,
    merge,
)

# These are the alternatives of simple_tokenizer.py, in their order. Case is ignored although the
# text is lower-cased: "ſ", which `str.lower` does not change, counts as an s.
WORDS = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}"
    r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# CLIP's longest token has 32 bytes, so twice as many characters are read as a row can hold. This
# bounds the time: Unicode normalisation is quadratic in a run of combining marks. The worst marks,
# each of which becomes two in falling order, take 4 s for 20,000 of them, and hours for a megabyte.
CHARACTERS_PER_TOKEN = 64
# These bound the memory of a process that serves for months.
MAX_CACHED_WORDS, MAX_CACHED_LENGTH = 1 << 16, 32
MAX_SHOWN = 300


class SimpleTokenizer:
    """CLIP's byte-pair tokenizer.

    Every text encodes, because the vocabulary holds all bytes, within a word and at its end. A lone
    surrogate counts as U+FFFD. `<|startoftext|>` and `<|endoftext|>` in a text give the ids that
    they name.

    Args:
        vocabulary: mapping from token to id; the ids are 0 to n - 1.
        merges: pairs of symbols, in the order in which they are merged.
        pad_id: int, id that fills rows; `None` for the end id (Stable Diffusion 1). Stable
            Diffusion 2 has 0.
        max_length: int, number of ids in a row.
        unknown_id: int, id of the bytes that the vocabulary lacks; `None` if it must hold all.

    Raises:
        ValueError: If vocabulary and merges do not fit together.

    Example:
        >>> tokenizer = SimpleTokenizer.byte_level()
        >>> tokenizer.encode("Hi!")
        [512, 71, 328, 256, 513]
        >>> tokenizer.rows(["Hi!", ""]).shape
        (2, 77)
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        pad_id: int | None = None,
        max_length: int = MAX_LENGTH,
        unknown_id: int | None = None,
    ):
        self.merges = tuple((first, second) for first, second in merges)
        files.check_vocabulary(vocabulary, self.merges, needs_bytes=unknown_id is None)
        if max_length < 2:
            raise ValueError(
                f"`max_length` must be 2 or more, for the start and end ids. Received: {max_length}"
            )
        self.encoder = dict(vocabulary)
        self.decoder = {index: token for token, index in self.encoder.items()}
        self.max_length = max_length
        self.pad_id = self.end_of_text if pad_id is None else pad_id
        self.unknown_id = self.end_of_text if unknown_id is None else unknown_id
        if not self.decoder.keys() >= {self.pad_id, self.unknown_id}:
            raise ValueError(
                f"`pad_id` and `unknown_id` must be ids of the vocabulary, 0 to "
                f"{len(self.encoder) - 1}, or None. Received: {pad_id}, {unknown_id}"
            )
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._cache: dict[str, Sequence[int]] = {}
        self._added: dict[str, str] = {}  # cleaned form -> token
        self._added_pattern: regex.Pattern | None = None

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> SimpleTokenizer:
        """Read the `tokenizer/` folder of a diffusers checkpoint.

        It reads tokenizer.json, or else vocab.json and merges.txt, and the pad token, the length of
        rows and the added tokens from the files beside them.

        Args:
            path: the folder.

        Returns:
            `SimpleTokenizer`.

        Raises:
            ValueError: If a file is missing or malformed; the message names it.
        """
        folder = files.read_folder(Path(path))
        added = set(folder.added)
        trained = {token: index for token, index in folder.ids.items() if token not in added}
        tokenizer = cls(
            trained, folder.merges, max_length=folder.max_length, unknown_id=folder.unknown_id
        )
        try:
            tokenizer.add_tokens(folder.added)
        except ValueError as error:
            raise ValueError(f"{path}: {error} Rename one of them in its files.") from error
        tokenizer.pad_id = folder.pad_id  # it may be the id of an added token
        return tokenizer

    @classmethod
    def from_bpe(
        cls,
        path: str | os.PathLike,
        *,
        pad_id: int | None = None,
        max_length: int = MAX_LENGTH,
    ) -> SimpleTokenizer:
        """Read OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

        Args:
            path: the file.
            pad_id, max_length: see the class.

        Returns:
            `SimpleTokenizer`.

        Raises:
            ValueError: If the file is missing or malformed.
        """
        merges = files.read_bpe(path)
        return cls(files.trained_ids(merges), merges, pad_id=pad_id, max_length=max_length)

    @classmethod
    def byte_level(
        cls, *, pad_id: int | None = None, max_length: int = MAX_LENGTH
    ) -> SimpleTokenizer:
        """Make a tokenizer without merges: 256 bytes, 256 at a word's end, the start and end ids.

        Args:
            pad_id, max_length: see the class.

        Returns:
            `SimpleTokenizer`.
        """
        return cls(files.trained_ids(()), (), pad_id=pad_id, max_length=max_length)

    @classmethod
    def default(cls, *, pad_id: int | None = None, max_length: int = MAX_LENGTH) -> SimpleTokenizer:
        """Read CLIP's vocabulary from the file in `KDIFFUSION_CLIP_VOCAB`, or download it once.

        The download goes to Keras's cache (`KERAS_HOME`) and is verified by its SHA-256.

        Args:
            pad_id, max_length: see the class.

        Returns:
            `SimpleTokenizer`.

        Raises:
            ValueError: If the variable names no file, or the download failed.
        """
        return cls.from_bpe(files.find_vocabulary(), pad_id=pad_id, max_length=max_length)

    @property
    def vocab(self) -> list[str]:
        """Return the tokens in the order of their ids."""
        return [self.decoder[index] for index in range(len(self.decoder))]

    @property
    def start_of_text(self) -> int:
        """Return the id that starts every row: 49406 in CLIP's vocabulary."""
        return self.encoder[START]

    @property
    def end_of_text(self) -> int:
        """Return the id that ends every text: 49407 in CLIP's vocabulary."""
        return self.encoder[END]

    def add_tokens(self, tokens: str | Iterable[str]) -> int:
        """Add tokens, each new one with the next id.

        An added token is found anywhere in a text, in upper and lower case, and the longest first,
        as in transformers.

        Args:
            tokens: a token, or several; those that the vocabulary holds are skipped.

        Returns:
            int, the number of new tokens.

        Raises:
            ValueError: If a token is blank, or differs from another one only by case.
        """
        added = dict(self._added)
        for token in [tokens] if isinstance(tokens, str) else dict.fromkeys(tokens):
            if token in self.encoder:
                continue
            form = self.clean(token)
            if not form or form in (START, END) or form in added:
                raise ValueError(
                    "An added token must not be blank, and must differ from every other by more "
                    f"than case. Received: {token!r}. Existing: {added.get(form, form)!r}"
                )
            added[form] = token
        new = list(added.values())[len(self._added) :]
        for token in new:
            index = len(self.encoder)
            self.encoder[token] = index
            self.decoder[index] = token
        self._added = added
        if new:
            longest_first = sorted(added, key=len, reverse=True)
            alternatives = "|".join(regex.escape(form) for form in longest_first)
            self._added_pattern = regex.compile(f"({alternatives})")
        return len(new)

    @staticmethod
    def clean(text: str) -> str:
        """Repair mojibake, undo HTML escapes twice, fold whitespace and lower the case.

        Args:
            text: a prompt.

        Returns:
            The cleaned text.

        Raises:
            ValueError: If `text` is not a string.
        """
        if not isinstance(text, str):
            raise ValueError(f"A prompt must be a string. Received: {type(text).__name__}")
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return regex.sub(r"\s+", " ", text).strip().lower()

    def encode(self, text: str) -> list[int]:
        """Encode a text of any length.

        The time grows with the square of the longest run of combining marks; use `rows` for texts
        of strangers.

        Args:
            text: a prompt.

        Returns:
            List of the start id, the ids of the cleaned text's words, and the end id.
        """
        return [self.start_of_text, *self.encode_cleaned(self.clean(text)), self.end_of_text]

    def encode_cleaned(self, text: str) -> list[int]:
        """Encode a cleaned text, without start and end ids.

        Args:
            text: a result of `clean`.

        Returns:
            List of the ids of its words.
        """
        ids = []
        for part in self._added_pattern.split(text) if self._added_pattern else [text]:
            if part in self._added:
                ids.append(self.encoder[self._added[part]])
            else:
                for word in WORDS.findall(part):
                    ids.extend(self._encode_word(word))
        return ids

    def bpe(self, token: str) -> str:
        """Merge the symbols of a word.

        Args:
            token: the word, with the vocabulary's symbol for each byte.

        Returns:
            The word's tokens, separated by spaces.
        """
        if token in (START, END):
            return token
        symbols = list(token)
        symbols[-1:] = [symbol + WORD_END for symbol in symbols[-1:]]
        return " ".join(merge(symbols, self._ranks))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to a text, with a space after each word.

        Args:
            ids: integers, such as those of `encode`.

        Returns:
            The text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        content = bytearray()
        for index in map(int, ids):
            token = self.decoder.get(index)
            if token is None:
                raise ValueError(
                    f"Ids must be 0 to {len(self.decoder) - 1}, as in the vocabulary. "
                    f"Received: {index}"
                )
            if token in (START, END):
                content += token.encode()
            elif index >= len(self.decoder) - len(self._added):
                content += f"{token} ".encode(errors="replace")
            else:
                symbols = token.removesuffix(WORD_END)
                # No token but the unknown one, such as "<unk>", has other symbols.
                content += b"".join(SYMBOL_BYTES.get(symbol, b"?") for symbol in symbols)
                content += b" " * (symbols != token)
        return content.decode("utf-8", errors="replace")

    def rows(self, prompts: Sequence[str], *, warn: bool = True) -> np.ndarray:
        """Encode prompts to rows for a text encoder.

        Args:
            prompts: list of texts. A prompt that is longer than a row keeps its first words, and a
                warning shows the others. At most 64 characters an id are read, 4,928 for 77 ids.
            warn: bool; `False` hides the warning, for many captions.

        Returns:
            int32 (len(prompts), max_length): start id, words, end id, then `pad_id`.

        Raises:
            ValueError: If `prompts` is not a list of strings.
        """
        listed = isinstance(prompts, Collection) and not isinstance(prompts, str)
        if not listed or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`prompts` must be a list of strings. Received: {prompts!r:.200}")
        rows = np.full((len(prompts), self.max_length), self.pad_id, np.int32)
        for n, prompt in enumerate(prompts):
            ids, dropped = self._truncate(prompt)
            rows[n, : len(ids)] = ids
            if dropped and warn:
                more = " …" if len(dropped) > MAX_SHOWN else ""
                warnings.warn(
                    f"Prompt {n} is longer than the {self.max_length - 2} tokens of a row. "
                    f"Dropped: {dropped[:MAX_SHOWN]!r}{more}",
                    stacklevel=2,
                )
        return rows

    def save(self, folder: str | os.PathLike) -> None:
        """Write a `tokenizer/` folder that transformers' CLIPTokenizer and `from_folder` read.

        Args:
            folder: path of the folder, which is made if it does not exist.
        """
        added = tuple(self._added.values())
        content = files.FolderVocabulary(
            self.encoder, self.merges, added, self.pad_id, self.unknown_id, self.max_length
        )
        files.write_folder(Path(folder), content)

    def _truncate(self, prompt: str) -> tuple[list[int], str]:
        """Return the ids that fit a row, and the words that do not."""
        limit = CHARACTERS_PER_TOKEN * self.max_length
        *ids, end = self.encode(prompt[:limit])
        room = self.max_length - 1
        dropped = self.decode(ids[room : room + MAX_SHOWN])
        unread = prompt[limit:].strip()[:MAX_SHOWN]
        return [*ids[:room], end], (dropped + (self.clean(unread) or unread)).strip()

    def _encode_word(self, word: str) -> Sequence[int]:
        if (ids := self._cache.get(word)) is not None:
            return ids
        # Only a text that was not cleaned holds a surrogate.
        symbols = "".join(BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", errors="replace"))
        tokens = self.bpe(symbols).split(" ")
        ids = tuple(self.encoder.get(token, self.unknown_id) for token in tokens)
        if len(word) <= MAX_CACHED_LENGTH and len(self._cache) < MAX_CACHED_WORDS:
            self._cache[word] = ids
        return ids
