"""One way to say a thing: figures, cut texts, wrapped lines, tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.words import (
    WIDTH,
    aligned_table,
    brief_time,
    cut_end,
    cut_middle,
    figure,
    markdown_table,
    with_error,
    wrap,
)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (figure(7.36), "7.4"),
        (figure(1234.5), "1,234"),
        (figure(20.4, whole_from=20), "20"),
        (with_error(12.3456, 0.0214), "12.346 ± 0.021"),
        (with_error(5, 31), "5 ± 31"),
        (with_error(1, 1e-9, most=3), "1.000 ± 0.000"),
        (brief_time(0.8124), "812 ms"),
        (brief_time(9.64), "9.6 s"),
        (cut_end("abcdef", 6), "abcdef"),
        (cut_end("abcdefg", 6), "abcde…"),
        (cut_middle("abcdefg", 7), "abcdefg"),
        (cut_middle("abcdefgh", 7), "ab…efgh"),
    ],
)
def test_what_is_said(said, wanted):
    assert said == wanted


def test_lines_are_wrapped():
    assert wrap("one two-three four", 10) == "one two-\nthree four"
    assert wrap("one two-three four", 10, hyphens=False) == "one\ntwo-three\nfour"
    assert wrap("a longestword", 6, long_words=False, first="- ", rest="  ") == "- a\n  longestword"


def test_a_table_to_be_rendered():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x/y | 1 |"
    assert "| --- | --- |" in markdown_table(["a", "b"], [], left=range(2))


def test_a_table_to_be_read():
    assert aligned_table(["name", "n"], [["a|b", "1"], ["longer", "100"]]) == (
        "| name   |   n |\n| ------ | --: |\n| a/b    |   1 |\n| longer | 100 |"
    )


@given(
    st.lists(
        st.tuples(
            st.text("ab-|", max_size=90), st.text("ab-|", max_size=90), st.text("1", max_size=20)
        ),
        max_size=4,
    )
)
def test_names_give_way_to_figures(rows):
    lines = aligned_table(["name", "test", "figure"], rows, left=(0, 1)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= WIDTH
    for (*_, n), line in zip(rows, lines[2:], strict=True):
        assert line.strip("|").split("|")[-1].strip() == n
