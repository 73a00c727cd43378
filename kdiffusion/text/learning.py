"""Learn a small vocabulary of byte pairs for CLIP's tokenizer (Sennrich et al. 2016)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from kdiffusion.text.tokenizer import WORDS, SimpleTokenizer
from kdiffusion.text.vocabulary import BYTE_SYMBOLS, END, START, WORD_END, merge

UNKNOWN = "<unk>"
# The characters of a cleaned English text; others become UNKNOWN.
_ALPHABET = "".join(sorted(string.digits + string.ascii_lowercase + string.punctuation))


def learn_tokenizer(texts: Iterable[str], size: int, max_length: int) -> SimpleTokenizer:
    """Learn a tokenizer by merging the most frequent pair of symbols, again and again.

    Sennrich et al. 2016, algorithm 1. Pairs that are equally frequent are merged in the order of
    their symbols, so the same texts give the same tokenizer.

    Args:
        texts: texts to learn from, such as captions.
        size: int, the largest number of tokens.
        max_length: int, number of ids in a row.

    Returns:
        `SimpleTokenizer` of printable ASCII, with one id for all other characters.

    Raises:
        ValueError: If `size` is too small for the alphabet.

    Example:

    >>> len(learn_tokenizer(["a red bus", "a red car"], size=200, max_length=16).vocab)
    145
    """
    tokens = [*_ALPHABET, *(symbol + WORD_END for symbol in _ALPHABET)]
    special = [UNKNOWN, START, END]
    if size < len(tokens) + len(special):
        raise ValueError(
            f"`size` must be {len(tokens) + len(special)} or more, for the alphabet. "
            f"Received: {size}"
        )
    counts = Counter(word for text in texts for word in WORDS.findall(SimpleTokenizer.clean(text)))
    words = [(_symbols(word), count) for word, count in counts.items()]
    merges: list[tuple[str, str]] = []
    while len(tokens) + len(special) < size and (pair := _most_frequent(words)):
        words = [(merge(symbols, {pair: 0}), count) for symbols, count in words]
        merges.append(pair)
        tokens.append("".join(pair))
    ids = {token: index for index, token in enumerate([*tokens, *special])}
    return SimpleTokenizer(ids, merges, max_length=max_length, unknown_id=ids[UNKNOWN])


def _symbols(word):
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode()]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def _most_frequent(words):
    pairs: Counter[tuple[str, str]] = Counter()
    for symbols, count in words:
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += count
    return min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
