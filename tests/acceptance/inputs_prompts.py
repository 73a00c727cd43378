"""The prompts of `inputs.py`."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from inputs_case import Case

from kdiffusion.text.tokenizer import CHARACTERS_PER_TOKEN, SimpleTokenizer

# A token of the preset's vocabulary is a byte, so a letter and a space are one, and a row of 77
# with its start and end has room for 75. Each: prompt, the same in plain words, what it is not,
# and the warning of what is dropped.
PROMPTS = {
    "empty": ("", " \t\n", "a", ""),
    "upper case": ("A CAT", "a cat", "a", ""),
    "list of one": (["a cat"], "a cat", "", ""),
    "tuple": (("a cat",), "a cat", "", ""),
    "array": (np.array(["a cat"]), "a cat", "", ""),
    "77 tokens": ("a " * 75, " a" * 75, "a " * 74, ""),
    "78 tokens": ("a " * 75 + "b", "a " * 75, "a " * 74, "75 tokens .*Dropped: 'b'$"),
    "78 tokens, the last of a word": ("a " * 74 + "be", "a " * 74 + "bee", "a " * 74, "'e'$"),
    "100,000 tokens": ("a b " * 50_000, "a b " * 38, "a b " * 37, "Dropped: 'b a b a .* …$"),
    "NUL": ("a\0cat", "acat", "a", ""),
    "escape sequence": ("a \x1b[31mcat", "a cat", "a", ""),
    "lone surrogate": ("a \ud800", "a \ufffd", "a", ""),
    "lone surrogate as an entity": ("a &#xD800;", "a \ufffd", "a", ""),
    "surrogate pair": ("\ud83d\ude00", "\U0001f600", "\ufffd", ""),
    "emoji": ("A 🧑‍🚀🇺🇸", "a 🧑‍🚀🇺🇸", "a 🧑", ""),
    "right to left": ("שלום עולם", "שלום \n עולם", "עולם שלום", ""),
    "right to left override": ("\u202ea cat", "\u202eA CAT", "tac a", ""),
    "NFC": ("caf\u00e9", "cafe\u0301", "cafe", ""),
    "NFD": ("cafe\u0301", "caf\u00e9", "cafe", ""),
    "combining run": ("a" + "\u0301\u0323" * 9, "a" + "\u0323" * 9 + "\u0301" * 9, "a", ""),
    "100,000 combining marks": ("\u0301" * 10**5, "\u0301" * 200, "", "Dropped: '"),
    "100,000 opening brackets": ("(" * 10**5, "(" * 200, "(" * 75, r"Dropped: '\({300}' …$"),
    "unclosed brackets": ("[(a cat", "[( A cat", "[a cat", ""),
    "brackets closed, not opened": ("a cat)]", "a cat )]", "a cat]", ""),
    "weight of 1e309": ("(cat:1e309)", "( cat : 1 e 3 0 9 )", "cat", ""),
    "weight of -nan": ("(cat:-nan)", "( cat :- nan )", "cat", ""),
    "end of text, at the end": ("a cat <|endoftext|>", "a cat", "a cat <|", ""),
    "end of text, within": ("a <|endoftext|> cat", "a<|EndOfText|>cat", "a", ""),
    "start of text": ("<|startoftext|>cat", "<|STARTOFTEXT|> cat", "cat", ""),
    "HTML entities": ("&lt;b&gt; &quot;a&quot; &#128512;", '<b> "a" 😀', "b a", ""),
    "HTML entities, twice": ("&amp;lt;b&amp;gt;", "<b>", "b lt", ""),
    "mojibake": ("crÃ¨me", "crème", "creme", ""),
}

# What holds no text, and the error.
FAULTS = {
    "None": (None, "`prompts?` must be"),
    "int": (3, "`prompts?` must be"),
    "float": (np.nan, "`prompts?` must be"),
    "object": (object(), "`prompts?` must be"),
    "bytes": (b"cat", "must be a list of strings"),
    "path": (Path("cat"), "`prompts?` must be"),
    "empty list": ([], "must be a text or a list of texts"),
    "list of None": ([None], "must be a list of strings"),
    "list with None": (["cat", None], "must be a list of strings"),
    "list with bytes": (["cat", b"cat"], "must be a list of strings"),
    "list in a list": ([["cat"]], "must be a list of strings"),
}
NEGATIVE_FAULTS = {
    "int": (3, "`negative_prompt` must be"),
    "bytes": (b"cat", "`negative_prompt` must be"),
    "empty list": ([], "`negative_prompt` must be"),
    "list of None": ([None], "must be a list of strings"),
    "more than prompts": (["a", "b"], "one for each image. Received: 2 values"),
}

# Megabytes: a million characters. The worst for what cleans them, splits them or merges words.
LIMIT = CHARACTERS_PER_TOKEN * 77
LONG = {
    "one word": "ab" * 500_000,
    "words": "the cat " * 125_000,
    "different words": " ".join(f"{i:x}g{i * 7919:x}" for i in range(80_000))[:1_000_000],
    "one combining mark": "\u0301" * 1_000_000,
    "marks out of order": "\u0301\u0323" * 500_000,
    # Each becomes two marks, and each of the second half's passes each of the first half's.
    "marks in the worst order": "\u0344" * (LIMIT // 2) + "\u0f81" * 1_000_000,
    "marks on a letter": "a" + "\u0315\u0300\u05ae\u0300\u0338" * 200_000,
    "Hangul in parts": "\u1112\u1161\u11ab" * 333_334,
    "emoji": "🧑‍🚀" * 333_334,
    "flags": "🇺🇸" * 500_000,
    "opening brackets": "(" * 1_000_000,
    "brackets": "([{<" * 250_000,
    "newlines": "\n" * 1_000_000,
    "newlines, then a word": "\n" * 1_000_000 + "cat",
    "carriage returns": "a\r\n\u2028" * 250_000,
    "ampersands": "&" * 1_000_000,
    "entities": "&amp;amp;lt;" * 83_334,
    "longest entity": "&CounterClockwiseContourIntegral" * 31_251,
    "mojibake": "Ã¢â‚¬â„¢Ã©" * 100_000,
    "quotation marks": "“”‘’" * 250_000,
    "ligatures": "ﬃﷺ" * 500_000,
    "full width": "ＡＢ　" * 333_334,
    "lone surrogates": "\ud800" * 1_000_000,
    "surrogate pairs": "\ud83d\ude00" * 500_000,
    "escape sequences": "\x1b[31m" * 200_000,
    "half an escape sequence": "\x1b[" + "1;" * 500_000,
    "end of text": "<|endoftext|>" * 76_924,
    "nearly end of text": "<|endoftext" * 90_910,
    "apostrophes": "'s" * 500_000,
    "random characters": "".join(
        map(chr, np.random.RandomState(0).randint(0x20, 0xD800, 1_000_000))
    ),
}


def prompt_cases(model):
    draw = partial(model.text_to_image, num_steps=2, seed=7, verbose=0)
    for name, (prompt, plain, mistake, warning) in PROMPTS.items():
        yield Case(
            f"prompt: {name}",
            "as in plain words" + ", warning" * bool(warning),
            partial(draw, prompt),
            like=partial(draw, plain),
            unlike=partial(draw, mistake),
            warning=warning,
        )
    yield literal_case(draw)
    yield from batch_cases(draw)
    for name, (prompt, error) in FAULTS.items():
        yield Case(f"prompt: {name}", f"error: {error}", partial(draw, prompt), error)
        encode = partial(model.encode_text, prompt)
        yield Case(f"encode_text: {name}", f"error: {error}", encode, error)
    for name, (prompt, error) in NEGATIVE_FAULTS.items():
        call = partial(draw, "a cat", negative_prompt=prompt)
        yield Case(f"negative prompt: {name}", f"error: {error}", call, error)
    yield from long_cases(model.encode_text, "")
    if path := os.environ.get("KDIFFUSION_CLIP_VOCAB"):
        tokenizer = SimpleTokenizer.from_bpe(path)
        yield from long_cases(lambda prompt: tokenizer.rows([prompt]), ", CLIP's words")


def literal_case(draw):
    """Other programs' ways to name files in a prompt are plain words here."""
    Path("x").write_text("dog")
    opened = []
    sys.addaudithook(lambda event, arguments: event == "open" and opened.append(arguments[0]))

    def draw_and_listen():
        opened.clear()
        result = draw("<lora:x:1> __x__ @x {x|y}")
        if "x" in map(str, opened):
            raise AssertionError("the file was opened")
        return result

    return Case(
        "prompt: names of a file",
        "as in plain words, no file opened",
        draw_and_listen,
        like=partial(draw, "< lora : x : 1 > __ x __ @ x { x | y }"),
        unlike=partial(draw, "dog"),
    )


def batch_cases(draw):
    def alone(*prompts):
        return np.concatenate([draw(p, seed=7 + i) for i, p in enumerate(prompts)])

    for name, prompts in {
        "list": ["a cat", "", "\ud800"],
        "list of one that is dropped": ["a cat", "a " * 75 + "b"],
    }.items():
        yield Case(
            f"prompt: {name}",
            "each as alone, up to 1/255",
            partial(draw, prompts),
            like=partial(alone, *prompts),
            unlike=partial(alone, *reversed(prompts)),
            warning="Prompt 1 .*Dropped: 'b'$" if "dropped" in name else "",
            bar=1,
        )
    for name, negative in {"None": None, "empty": "", "list of an empty one": [""]}.items():
        yield Case(
            f"negative prompt: {name}",
            "as without",
            partial(draw, "a cat", negative_prompt=negative),
            like=partial(draw, "a cat"),
            unlike=partial(draw, "a cat", negative_prompt="a"),
        )


def long_cases(encode, vocabulary):
    for name, prompt in LONG.items():
        dropped = "" if name == "newlines" else "longer than the 75 tokens .*Dropped: ['\"]"
        yield Case(
            f"1 MB: {name}{vocabulary}",
            "as what a row can hold, 1 s" + ", warning" * bool(dropped),
            partial(encode, prompt),
            like=partial(encode, prompt[:LIMIT]),
            warning=dropped,
            seconds=1.0,
        )
