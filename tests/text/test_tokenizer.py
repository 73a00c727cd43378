import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from kdiffusion.text import vocabulary
from kdiffusion.text.tokenizer import SimpleTokenizer

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "clip_tokens.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text("utf-8"))["cases"]
CATERPILLAR = "a caterpillar smoking a hookah while sitting on a mushroom"
# A vocabulary of our own, small enough to count by hand: it starts at id 512.
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture
def tokenizer():
    return SimpleTokenizer(vocabulary.trained_ids(MERGES), MERGES)


@pytest.fixture(scope="module")
def clip():
    path = os.environ.get("KDIFFUSION_CLIP_VOCAB")
    if not path:
        pytest.skip("KDIFFUSION_CLIP_VOCAB does not name bpe_simple_vocab_16e6.txt.gz")
    return SimpleTokenizer.from_bpe(path)


# CLIP's own vocabulary


def test_clip_ids_that_keras_cv_documents(clip):
    assert clip.encode(CATERPILLAR)[:5] == [49406, 320, 27111, 9038, 320]
    assert clip.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (clip.start_of_text, clip.end_of_text, len(clip.vocab)) == (49406, 49407, 49408)


@pytest.mark.parametrize("case", GOLDEN, ids=[ascii(case["text"])[1:21] for case in GOLDEN])
def test_clip_ids_of_the_original_tokenizer(clip, case):
    assert clip.encode(case["text"]) == case["ids"]


def test_clip_words_decode(clip):
    assert clip.decode(clip.encode("A Photo of a CAT")) == (
        "<|startoftext|>a photo of a cat <|endoftext|>"
    )
    assert clip.decode(clip.encode("東京 🇺🇸!")[1:-1]) == "東京 🇺🇸! "


def test_clip_megabyte_of_one_word(clip):
    with pytest.warns(UserWarning, match="longer than the 75 tokens"):
        rows = clip.rows(["ab" * 500_000])
    assert rows[0, 0] == 49406 and rows[0, -1] == 49407
    assert len(clip.encode("ab" * 50_000)) > 77


# The two stages


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  A\t\n CAT\u3000on \u2028 it ", "a cat on it"),
        ("crÃ¨me brÃ»lÃ©e", "crème brûlée"),
        ("&amp;lt;b&amp;gt; &quot;", '<b> "'),
        ("it’s ‘so’", "it's 'so'"),
        ("nul\0, esc\x1b[31m", "nul, esc"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ud83d\ude00 \udc00", "\U0001f600 \ufffd"),
        ("&#xD800;", "\ufffd"),
        ("ΟΔΟΣ İ", "οδος i\u0307"),
        ("", ""),
    ],
)
def test_clean(text, expected):
    assert SimpleTokenizer.clean(text) == expected


@pytest.mark.parametrize("prompt", [None, b"cat", 3, ["cat"]])
def test_only_strings_are_prompts(tokenizer, prompt):
    with pytest.raises(ValueError, match="must be a string"):
        tokenizer.encode(prompt)
    with pytest.raises(ValueError, match="must be a list of strings"):
        tokenizer.rows([prompt])


@pytest.mark.parametrize("prompts", ["cat", None, 3, iter(["cat"])])
def test_rows_wants_a_list(tokenizer, prompts):
    with pytest.raises(ValueError, match=f"list of strings. Received: {prompts!r}"):
        tokenizer.rows(prompts)


def test_byte_level_ids_by_hand():
    tokenizer = SimpleTokenizer.byte_level()
    # "!" is byte 0x21 and the first symbol, so "h" is 0x68 - 0x21; a word's last byte counts from
    # 256 on. "é" is the bytes c3 a9: 94 symbols, then a1-ac, then ae-ff.
    assert len(tokenizer.vocab) == 514
    assert tokenizer.encode("Hi!") == [512, 71, 256 + 72, 256, 513]
    assert tokenizer.encode("é") == [512, 94 + 12 + 0xC3 - 0xAE, 256 + 94 + 0xA9 - 0xA1, 513]
    assert tokenizer.encode(" ") == tokenizer.encode("\0") == [512, 513]
    assert tokenizer.bpe("cat") == "c a t</w>"


def test_merges_in_order_of_rank(tokenizer):
    assert tokenizer.bpe("cat") == "cat</w>"
    assert tokenizer.bpe("cath") == "ca t h</w>"
    assert tokenizer.bpe("thca") == "th c a</w>"
    assert tokenizer.encode("the cat, dog")[1:-1] == [515, 513, 256 + 11, 517]


def test_words_split_as_in_clip():
    tokenizer = SimpleTokenizer.byte_level()

    def words(text):
        return tokenizer.decode(tokenizer.encode_cleaned(text)).split()

    assert words("don't we'll x's") == ["don", "'t", "we", "'ll", "x", "'s"]
    assert words("v15 snake_case!?") == ["v", "1", "5", "snake", "_", "case", "!?"]
    assert words("'ſ") == ["'ſ"]


def test_special_tokens_in_a_text_give_their_ids():
    tokenizer = SimpleTokenizer.byte_level()
    assert tokenizer.encode("<|endoftext|> <|StartOfText|>") == [512, 513, 512, 513]
    # Not at the start of a word it is punctuation and letters, as in the original.
    assert 513 not in tokenizer.encode("!<|endoftext|>")[:-1]


def test_an_uncleaned_surrogate_does_not_crash():
    tokenizer = SimpleTokenizer.byte_level()
    assert tokenizer.decode(tokenizer.encode_cleaned("\ud800")) == "? "


@pytest.mark.parametrize("size", [0, 1, 2, 3, 17, 60])
def test_merge_equals_the_textbook(size):
    generator = random.Random(size)
    for _ in range(300):
        parts = ["a", "b", "ab", "ba", "aa", "bb", "aab", "aba", "abb", "aaaa"]
        pairs = {(generator.choice(parts), generator.choice(parts)) for _ in range(12)}
        ranks = {pair: rank for rank, pair in enumerate(pairs)}
        word = generator.choices("ab", k=size)
        expected = list(word)
        while known := [pair for pair in zip(expected, expected[1:]) if pair in ranks]:
            first, second = min(known, key=ranks.get)
            merged = []
            for symbol in expected:
                # A symbol that this pass made is not merged again before the next one.
                if merged and merged[-1] == (first, False) and symbol == second:
                    merged[-1] = (first + second, True)
                else:
                    merged.append((symbol, False))
            expected = [symbol for symbol, _ in merged]
        assert vocabulary.merge(list(word), ranks) == expected


def test_merge_looks_at_each_place_a_bounded_number_of_times():
    class Counted(dict):
        looks = 0

        def __contains__(self, pair):
            self.looks += 1
            return super().__contains__(pair)

    looks = []
    for size in (1_000, 10_000):
        doubling = ["a" * 2**power for power in range(10)]
        ranks = Counted({(part, part): rank for rank, part in enumerate(doubling)})
        assert "".join(vocabulary.merge(["a"] * size, ranks)) == "a" * size
        looks.append(ranks.looks / size)
    assert max(looks) < 4


# Rows


def test_rows_are_padded_with_the_end_id_or_with_another(tokenizer):
    rows = tokenizer.rows(["the cat", ""])
    assert rows.dtype == np.int32 and rows.shape == (2, 77)
    start, end = tokenizer.start_of_text, tokenizer.end_of_text
    np.testing.assert_array_equal(rows[0], [start, 515, 513, end] + [end] * 73)
    np.testing.assert_array_equal(rows[1], [start, end] + [end] * 75)
    padded = SimpleTokenizer(vocabulary.trained_ids(MERGES), MERGES, pad_id=0, max_length=6)
    np.testing.assert_array_equal(padded.rows(["the cat"]), [[start, 515, 513, end, 0, 0]])
    assert padded.rows([]).shape == (0, 6)


def test_a_full_row_is_not_truncated(tokenizer, recwarn):
    rows = tokenizer.rows(["cat " * 75])
    assert rows[0].tolist() == [tokenizer.start_of_text] + [513] * 75 + [tokenizer.end_of_text]
    assert not recwarn.list


def test_truncation_keeps_the_end_id_and_shows_what_it_drops(tokenizer):
    with pytest.warns(UserWarning, match=r"Prompt 1 .* 75 tokens .* Dropped: 'the dog'$") as shown:
        rows = tokenizer.rows(["cat", "cat " * 75 + "the dog"])
    assert rows[1].tolist() == [tokenizer.start_of_text] + [513] * 75 + [tokenizer.end_of_text]
    assert [Path(warning.filename).name for warning in shown] == [Path(__file__).name]


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 1_000_000,
        "\n" * 1_000_000 + "cat",
        "\u0301\u0323" * 250_000,
        "(" * 1_000_000,
        "😂" * 250_000,
        "the cat " * 125_000,
    ],
    ids=["word", "lines", "marks", "brackets", "emoji", "words"],
)
def test_a_megabyte_is_read_as_far_as_a_row_can_hold(tokenizer, prompt):
    with pytest.warns(UserWarning, match="Dropped: '"):
        rows = tokenizer.rows([prompt])
        np.testing.assert_array_equal(rows, tokenizer.rows([prompt[:30_000]]))


def test_a_row_reads_64_characters_an_id(tokenizer):
    end = tokenizer.end_of_text
    assert tokenizer.rows([" " * (64 * 77 - 3) + "cat"])[0, :3].tolist() == [518, 513, end]
    with pytest.warns(UserWarning, match="Dropped: 'cat'$"):
        assert tokenizer.rows([" " * (64 * 77) + "cat"])[0, 1] == end


def test_decode_is_the_inverse_up_to_spaces(tokenizer):
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(chr(generator.randrange(0x20, 0xD7FF)) for _ in range(20))
        cleaned = tokenizer.clean(text)
        # IGNORECASE drops U+0345, whose folded form is a letter: so does the original.
        expected = re.sub("[\\s\u0345]", "", cleaned)
        decoded = tokenizer.decode(tokenizer.encode_cleaned(cleaned))
        assert re.sub(r"\s", "", decoded) == expected


def test_decode_takes_arrays_and_names_unknown_ids(tokenizer):
    assert tokenizer.decode(np.array([515, 513])) == "the cat "
    assert tokenizer.decode([94]) == "\ufffd"
    with pytest.raises(ValueError, match="Ids must be 0 to 519.*Received: 520"):
        tokenizer.decode([520])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pad_id": 520}, "must be ids of the vocabulary, 0 to 519, .*Received: 520, None"),
        ({"unknown_id": -1}, "must be ids of the vocabulary, 0 to 519, .*Received: None, -1"),
        ({"max_length": 1}, "`max_length` must be 2 or more.*Received: 1"),
    ],
)
def test_constructor_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleTokenizer(vocabulary.trained_ids(MERGES), MERGES, **options)


# Added tokens


def test_added_tokens_are_found_in_any_case_and_place(tokenizer):
    assert tokenizer.add_tokens(["<MyCat>", "<MyCat>-2", "cat</w>"]) == 2
    assert tokenizer.add_tokens("<MyCat>") == 0
    assert tokenizer.vocab[520:] == ["<MyCat>", "<MyCat>-2"]
    assert tokenizer.encode("the <MyCat>,<mycat>-2")[1:-1] == [515, 520, 256 + 11, 521]
    assert tokenizer.decode([515, 520, 513]) == "the <MyCat> cat "
    assert tokenizer.start_of_text == 518
    assert tokenizer.add_tokens("Über Katze") == 1
    assert tokenizer.encode("xüber katze!")[1:-1] == [87 + 256, 522, 256]
    assert tokenizer.decode([522]) == "Über Katze "


@pytest.mark.parametrize("token", ["", " \n", "<mycat>", "<|EndOfText|>"])
def test_added_tokens_that_no_text_could_name(tokenizer, token):
    tokenizer.add_tokens("<MyCat>")
    with pytest.raises(ValueError, match="added token"):
        tokenizer.add_tokens(["fine", token])
    assert len(tokenizer.vocab) == 521 and "fine" not in tokenizer.encoder


@pytest.mark.parametrize("text", [case["text"] for case in GOLDEN], ids=range(len(GOLDEN)))
def test_every_text_encodes_without_any_file(text):
    tokenizer = SimpleTokenizer.byte_level()
    ids = tokenizer.encode(text)
    assert ids[0] == 512 and ids[-1] == 513
    assert tokenizer.encode(tokenizer.decode(ids[1:-1])) == ids
