"""README_zh.md says what README.md says: the same sections, code, commands, links, pictures, tables and numbers, in Chinese."""

import re
from collections import Counter

import pytest

from tests.conftest import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
CROSS = ("README.md", "README_zh.md")  # each page links to the other


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def words(text: str) -> str:
    """A page without its fenced blocks, and without the lines that four spaces make a formula."""
    return re.sub(r"^    .*$", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)


def formulas(text: str) -> list[str]:
    return re.findall(r"^    .*$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)


def code(text: str) -> list[str]:
    """What stands between backquotes, outside the blocks."""
    return re.findall(r"`([^`\n]+)`", words(text))


def links(text: str) -> list[tuple[str, str]]:
    """(words, target) of every link and of every picture but the two links between the pages; a picture's words begin with !."""
    return [(shown, target) for shown, target in re.findall(r"(!?\[[^\]]*\])\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", words(text)))
            if target not in CROSS]  # fmt: skip


def pictures(text: str) -> list[str]:
    return [target for shown, target in links(text) if shown.startswith("!")]


def headings(text: str) -> list[str]:
    return re.findall(r"^#+(?= )", words(text), re.MULTILINE)


def numbers(text: str) -> list[str]:
    """Every number of a text, with its minus and its %: outside inline code and the targets of links, and not in a name (R1)."""
    text = re.sub(r"\]\([^)\s]+\)", "]", re.sub(r"`[^`\n]+`", "", text))
    return re.findall(r"(?:(?<=\s)-)?(?<![A-Za-z0-9_.,])\d+(?:,\d{3})*(?:\.\d+)?(?: ?%)?", text)


def tables(text: str) -> list[list[tuple[int, list[str]]]]:
    """For each table its rows: (how many cells, the numbers in order)."""
    found = re.findall(r"(?:^\|.*\n)+", words(text), re.MULTILINE)
    return [[(len(row.split(" | ")), sorted(numbers(row))) for row in table.splitlines()] for table in found]


def differ(english: list, chinese: list) -> tuple[list, list]:
    """What the English page alone holds, and what the Chinese page alone holds; the order does not matter."""
    return list((Counter(english) - Counter(chinese)).elements()), list((Counter(chinese) - Counter(english)).elements())


# ---------------------------------------------------------------- what is looked for is found


def test_the_numbers_of_a_text_are_found():
    text = "93.7 / 79.0 %, 1,000 steps, R1, ViT-B/32, | -0.25 |, `7`, [8](9), 26M, 46.3 -> 4.8 %, 3+3=6."
    assert numbers(text) == ["93.7", "79.0 %", "1,000", "32", "-0.25", "8", "26", "46.3", "4.8 %", "3", "3", "6"]
    assert numbers("用 10 到20分钟，得1，加 0.1。第 3, 3 行") == ["10", "20", "1", "0.1", "3", "3"]


def test_blocks_code_links_and_headings_of_a_text_are_found():
    text = "# A\n[b](c.py#L1-L2) `d [e](f)` ![g](h.png) [zh](README_zh.md)\n```text\n# i `j` 5\n```\n\n    k = 1\n\n## L\n"
    assert blocks(text) == [("text", "# i `j` 5\n")] and formulas(text) == ["    k = 1"] and code(text) == ["d [e](f)"]
    assert links(text) == [("[b]", "c.py#L1-L2"), ("![g]", "h.png")] and pictures(text) == ["h.png"]
    assert headings(text) == ["#", "##"] and not numbers(words(text))


def test_what_one_page_alone_holds_is_found_also_when_the_other_holds_it_less_often():
    assert differ(["1", "2", "2"], ["2", "3", "1"]) == (["2"], ["3"])


# ---------------------------------------------------------------- the pages


def test_each_page_links_to_the_other():
    assert "](README_zh.md)" in ENGLISH and "](README.md)" in "\n".join(CHINESE.splitlines()[:3])


def test_the_chinese_page_has_the_same_sections():
    assert headings(CHINESE) == headings(ENGLISH)


def test_the_chinese_page_has_the_same_blocks_of_code_and_formulas():
    """A block of text may be translated. It keeps its numbers."""
    assert [language for language, _ in blocks(CHINESE)] == [language for language, _ in blocks(ENGLISH)]
    for (language, english), (_, chinese) in zip(blocks(ENGLISH), blocks(CHINESE), strict=True):
        if language == "text" and re.search(r"[\u4e00-\u9fff]", chinese):
            assert differ(numbers(english), numbers(chinese)) == ([], [])
        else:
            assert chinese == english
    assert formulas(CHINESE) == formulas(ENGLISH)


@pytest.mark.parametrize("found", [code, pictures])
def test_the_chinese_page_has_the_same_commands_and_other_inline_code_and_pictures(found):
    assert found(ENGLISH) and differ(found(ENGLISH), found(CHINESE)) == ([], [])


def test_the_chinese_page_has_the_same_links():
    """Those to lines of a file also keep the name that is defined there."""
    for exact in (False, True):
        english, chinese = ([(shown if exact else "", target) for shown, target in links(text) if not exact or "#L" in target]
                            for text in (ENGLISH, CHINESE))  # fmt: skip
        assert english and differ(english, chinese) == ([], [])


def test_the_chinese_page_has_the_same_numbers():
    assert differ(numbers(words(ENGLISH)), numbers(words(CHINESE))) == ([], [])


def test_the_tables_of_the_chinese_page_have_the_same_cells_and_numbers_row_by_row():
    assert tables(CHINESE) == tables(ENGLISH)


def test_each_section_of_the_chinese_page_has_the_numbers_and_the_code_of_its_section():
    english, chinese = (re.split(r"^## .*\n", words(text), flags=re.MULTILINE) for text in (ENGLISH, CHINESE))
    for number, (section, translated) in enumerate(zip(english, chinese, strict=True)):
        assert differ(numbers(section) + code(section), numbers(translated) + code(translated)) == ([], []), number
