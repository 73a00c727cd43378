"""Learning a small vocabulary of byte pairs for CLIP's tokenizer.

Sennrich et al. 2016, algorithm 1.
"""

import string
from collections import Counter
from collections.abc import Iterable

from kdiffusion.text.tokenizer import WORDS, SimpleTokenizer
from kdiffusion.text.vocabulary import BYTE_SYMBOLS, END, START, WORD_END, merge

UNKNOWN = "<unk>"
# What a cleaned English text is made of; whatever else a prompt holds becomes UNKNOWN.
_ALPHABET = "".join(sorted(string.digits + string.ascii_lowercase + string.punctuation))


def learn_tokenizer(texts: Iterable[str], size: int, max_length: int) -> SimpleTokenizer:
    """Learn a tokenizer by merging the most frequent pair of symbols, again and again.

    Pairs that are equally frequent are merged in the order of their symbols, so the same texts
    give the same tokenizer.

    Args:
        texts: what to learn from.
        size: int, number of tokens at most.
        max_length: int, number of ids in a row.

    Returns:
        A `SimpleTokenizer` that knows printable ASCII and an id for everything else.

    Raises:
        ValueError: `size` is too small for the alphabet.
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
