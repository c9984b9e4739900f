"""One reader of JSON objects: what is refused, and what is said of it."""

from __future__ import annotations

import pytest

from dus_edge.errors import CheckpointError
from dus_edge.jsonfile import find_object, read_object


def test_an_object_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"ü": [1]}', encoding="utf-8")
    assert read_object(path) == find_object(path) == {"ü": [1]}


def test_a_missing_file_is_none_or_named_with_its_remedy(tmp_path):
    path = tmp_path / "a.json"
    assert find_object(path) is None
    with pytest.raises(CheckpointError, match=r"a\.json is missing; fetch it again\.$"):
        read_object(path)
    with pytest.raises(CheckpointError, match=r"^the index is missing; build it\.$"):
        read_object(path, what="the index", missing="build it")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
)
@pytest.mark.parametrize("read", [find_object, read_object])
def test_damage_is_one_sentence_that_names_the_file(tmp_path, data, said, read):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a\.json {said}.*; fetch it again\.$") as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        find_object(tmp_path)
