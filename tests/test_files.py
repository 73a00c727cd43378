"""Files are written whole or not at all."""

import pytest

from kdiffusion.files import file_sha256, json_sha256, replacing

# Of the three bytes "abc", as FIPS 180-2 computes it.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert list(tmp_path.glob("*.png")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, existed):
    path = tmp_path / "notes.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(str(path)) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * existed


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("n" * 251 + ".txt")
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_digests(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == ABC
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": (2,), "a": 1})
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})
