"""Names appear unchanged in plots, tables, Markdown and HTML, even if they look like markup."""

import pytest
from markdown_it import MarkdownIt

from refbn_d2.evaluation.markdown import _plain
from refbn_d2.evaluation.printable import printable

NAMES = [
    "plain", "RefBN_1", "_x_", "__x__", "*a*", "`a`", "a|b", "a\\", "\\a", "$x^2$", "~~a~~",
    "<b>x</b>",
    "<!-- x", "&lt;", "&#60;", "[a](http://b)", "![a](b)", "[a][b]", "# a", "- a", "+ a", "1. a",
    "12) a", "> a", "a < b & c", "+12.5 [1, 2]", "37.0", "<script>alert(1)</script>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_is(name):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    table = f"| norm |\n|---|\n| {_plain(name)} |"
    for text, around in ((f"* {_plain(name)}", "li"), (table, "td")):
        tokens = parser.parse(text)
        inline = [t for t in tokens if t.type == "inline"][-1]
        assert [t.type for t in inline.children] == ["text"] * len(inline.children)
        assert "".join(t.content for t in inline.children) == name
        assert around in [t.tag for t in tokens]
        assert not {"h1", "blockquote", "ol"} & {t.tag for t in tokens}


def test_numbers_stay_as_they_were():
    assert [_plain(x) for x in ("37.0", "< 0.001", "+12.5 [−1.00, +2.00]")] == [
        "37.0", "< 0.001", "+12.5 [−1.00, +2.00]",
    ]  # fmt: skip


def test_printable():
    assert printable("BN é 狗 🐶 a\u200db") == "BN é 狗 🐶 a\u200db"
    assert printable("a\nb\tc\x1b[0m\u202e\ud800\x00") == "a b c\\x1b[0m\\u202e\\ud800\\x00"
    assert printable("x" * 50, 9) == "xxxx…xxxx"
