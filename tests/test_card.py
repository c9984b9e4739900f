"""Cards as people write them, and licence files."""

from pathlib import Path

import pytest

from dus_edge.checkpoint import card

MIT = """MIT License

Copyright (c) 2024 Someone

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
APACHE = """
                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/

   TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION
"""


def write_card(folder: Path, yaml: str) -> Path:
    (folder / "README.md").write_text(f"---\n{yaml}---\n\n# A model\n\nText.\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("license: apache-2.0\n", "apache-2.0"),
        ("license: Apache-2.0\n", "apache-2.0"),
        ("license: 'cc-by-nc-4.0'\n", "cc-by-nc-4.0"),
        ("license: llama3.1\n", "llama3.1"),
        ("license: [mit]\n", "mit"),
        ("license:\n- apache-2.0\n- mit\n", "apache-2.0, mit"),
        (
            "license: other\nlicense_name: Some-Model-License\nlicense_link: LICENSE\n",
            "some-model-license",
        ),
        ("license: other\nlicense_link: LICENSE\n", "other"),
        ("license: unknown\n", None),
        ("license_name: llama3\n", "llama3"),
        ("license:\n", None),
        ("license: {a: b}\n", None),
        ("language: en\n", None),
    ],
)
def test_licence_from_card(tmp_path: Path, yaml: str, expected: str | None) -> None:
    assert card.read_licence(write_card(tmp_path, yaml)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (APACHE, "apache-2.0"),
        (MIT, "mit"),
        (
            "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023",
            "llama2",
        ),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "llama3.1"),
        ("LLAMA 3.3 COMMUNITY LICENSE\nAGREEMENT\n", "llama3.3"),
        ("Modified " + MIT, None),
        (MIT + "Except that you pay us. " * 100, None),
        (APACHE + "and more terms of our own. " * 1000, None),
        ("All rights reserved. Not under the Apache License Version 2.0, January 2004.", None),
        ("", None),
    ],
)
def test_licence_from_file(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "LICENSE.txt").write_text(text, encoding="utf-8")
    assert card.read_licence(tmp_path) == expected


def test_this_projects_kind_of_full_text_is_recognised() -> None:
    # The full Apache text has about 10 300 characters once its white space is collapsed.
    assert card.recognise_licence(APACHE + "x " * 5_000) == "apache-2.0"


def test_card_wins_over_file_and_other_looks_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(MIT)
    assert card.read_licence(write_card(tmp_path, "license: apache-2.0\n")) == "apache-2.0"
    assert card.read_licence(write_card(tmp_path, "license: other\n")) == "mit"


def test_base_models_languages_tags(tmp_path: Path) -> None:
    write_card(
        tmp_path,
        "base_model:\n- org/one\n- org/two\nlanguage:\n- en\n- no\ntags: [a, 'b', 3, {c: d}]\n",
    )
    assert card.read_base_models(tmp_path) == ["org/one", "org/two"]
    assert card.languages(tmp_path) == ["en", "no"]  # Norwegian, not false
    assert card.tags(tmp_path) == ["a", "b", "3"]
    write_card(tmp_path, "base_model: org/one\nlanguages: ko\n")
    assert card.read_base_models(tmp_path) == ["org/one"]
    assert card.languages(tmp_path) == ["ko"]
    assert card.tags(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter\n",
        "---\nlicense: mit\n",  # never closed
        "---\nlicense: [mit\n---\n",
        "---\n\tlicense: mit\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\n---\n",
        "text\n---\nlicense: mit\n---\n",
        "---\nlicense: " + "[" * 5_000 + "\n---\n",
    ],
)
def test_broken_cards_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card.read_licence(tmp_path) is None
    assert card.read_base_models(tmp_path) == card.tags(tmp_path) == []


def test_an_error_elsewhere_loses_nothing(tmp_path: Path) -> None:
    write_card(tmp_path, "tags: [a\nmodel-index:\n- : :\n\tx\n'license' : mit\nbase_model: o/n\n")
    assert card.read_licence(tmp_path) == "mit"
    assert card.read_base_models(tmp_path) == ["o/n"]
    assert card.tags(tmp_path) == []


def test_long_tables_cost_nothing(tmp_path: Path) -> None:
    rows = "model-index:\n" + "- {name: x, results: [1, 2, 3]}\n" * 5_000
    write_card(tmp_path, f"license: mit\n{rows}tags:\n- a\n")
    assert card.read_licence(tmp_path) == "mit"
    assert card.tags(tmp_path) == ["a"]


def test_yaml_tags_do_nothing(tmp_path: Path) -> None:
    write_card(tmp_path, f"license: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    card.read_licence(tmp_path)
    assert not (tmp_path / "made").exists()


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\nauthor: \xff\xfe\n---\n")
    assert card.read_licence(tmp_path) == "mit"
    (tmp_path / "README.md").write_bytes(b"\xff\x00" * 300)
    assert card.read_licence(tmp_path) is None


def test_byte_order_mark_and_windows_lines() -> None:
    assert card.front_matter("\ufeff---\r\nlicense: mit\r\n---\r\nx")["license"] == "mit"


def test_no_folder(tmp_path: Path) -> None:
    assert card.read_licence(tmp_path / "none") is None
    assert card.languages(tmp_path / "none") == []
