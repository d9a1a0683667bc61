"""Plain text of the articles in a (compressed) MediaWiki XML dump.

The text follows the layout of WikiText: a line `` = Title = `` opens an article, `` = = Section = = ``
lines open its sections, and each paragraph is one line.  Tables, lists, footnotes, images, formulas and the
reference sections are dropped; so is every paragraph too short to be prose.
"""

import bz2
import html
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import mwparserfromhell

VERSION = 1  # raised whenever the text comes out differently

# Sections which hold lists of links or references rather than prose; dropped with their subsections.
_DROPPED_SECTIONS = frozenset(
    [
        "bibliography",
        "citations",
        "external links",
        "footnotes",
        "further reading",
        "gallery",
        "notes",
        "notes and references",
        "publications",
        "references",
        "references and notes",
        "see also",
        "sources",
        "works cited",
        "discography",
        "filmography",
        "selected bibliography",
        "related links",
        "primary sources",
        "secondary sources",
        "references and further reading",
        "notes and citations",
        "references and sources",
        "footnotes and references",
        "reference",
        "videos",
        "endnotes",
    ]
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REF = re.compile(r"<ref\b[^<>]*?/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_OPAQUE = re.compile(
    r"<(math|chem|gallery|timeline|score|syntaxhighlight|source|pre|table|imagemap|references|code|hiero)\b"
    r"(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_INNER_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}(?!\})).)*\|\}(?!\})", re.DOTALL)
_INNER_TEMPLATE = re.compile(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", re.DOTALL)
_DROPPED_LINK = re.compile(r"\[\[\s*(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)*)\s*:", re.IGNORECASE)
_LINK_BRACKET = re.compile(r"\[\[|\]\]")
_HEADING = re.compile(r"^(={2,6})\s*(.+?)\s*\1\s*$")
_LIST_LINE = re.compile(r"^\s*(?:[*#:;|!]|\{\||\|\}|----)")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_LEFT_OVER = re.compile(r"\u200b|'{2,}|\[\[(?:[a-z]+:)?|\]\]")
_EMPTY_BRACKETS = re.compile(r"[(\[]\s*(?:or|and|[,;:/.–-]|\s)*[)\]]")
_AFTER_OPENING = re.compile(r"([(\[])\s*(?:[,;:]\s*)+")
_BEFORE_CLOSING = re.compile(r"\s*(?:[,;]\s*)*\s([)\]])")
_BEFORE_POINT = re.compile(r"\s+([,.;:?!])(?=\s|$)")
# Templates which stand for words of the running text: name -> index of the argument that is shown.
_SHOWN_ARGUMENT = {
    "lang": 2, "nowrap": 1, "nobr": 1, "abbr": 1, "sic": 1, "smallcaps": 1, "transl": 2, "nihongo": 1, "quote": 1,
    "bce": 1, "ce": 1, "sup": 1, "sub": 1, "em": 1, "small": 1, "ship": 2, "frac": 1, "formatnum": 1, "cquote": 1,
    "blockquote": 1, "val": 1, "visible anchor": 1, "circa": 1, "script": 2, "unicode": 1, "not a typo": 1,
}  # fmt: skip
_LITERAL_TEMPLATES = {
    "ndash": " – ",
    "spaced ndash": " – ",
    "snd": " – ",
    "mdash": "—",
    "nbsp": " ",
    "'": "'",
    "-": "",
}
_UNIT_TEMPLATES = frozenset({"convert", "cvt"})


def _pages(xml_bz2: bytes) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of each article (namespace 0) that is not a redirect."""
    with bz2.open(io.BytesIO(xml_bz2)) as stream:
        for _, page in ElementTree.iterparse(stream, events=("end",)):
            if page.tag.rpartition("}")[2] != "page":
                continue
            namespace = page.tag.removesuffix("page")
            markup = page.findtext(f"{namespace}revision/{namespace}text") or ""
            is_article = page.findtext(f"{namespace}ns") == "0" and page.find(f"{namespace}redirect") is None
            title = page.findtext(f"{namespace}title") or ""
            page.clear()
            if is_article and not markup.lstrip().lower().startswith("#redirect"):
                yield title, markup


def _substitute_all(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Replace innermost matches until none is left, so that nested markup goes as well."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)  # type: ignore[call-overload]
    return text


def _expand_template(match: re.Match[str]) -> str:
    """The words which a template puts into the running text; nothing for most templates."""
    name, *fields = (field.strip() for field in match.group(1).split("|"))
    name = name.lower()
    if name in _LITERAL_TEMPLATES:
        return _LITERAL_TEMPLATES[name]
    arguments = [field for field in fields if not re.match(r"[\w ]+=", field)]
    if name in _UNIT_TEMPLATES and len(arguments) >= 2:
        if arguments[1] in {"-", "–", "to", "and", "by", "x", "+/-"} and len(arguments) >= 4:
            return " ".join(arguments[:4])
        return " ".join(arguments[:2])
    if name.startswith("lang-") and arguments:
        return arguments[0]
    shown = _SHOWN_ARGUMENT.get(name)
    return arguments[shown - 1] if shown is not None and len(arguments) >= shown else ""


def _drop_links(text: str) -> str:
    """Remove images, categories and links to other wikis, with the links nested in their captions."""
    kept: list[str] = []
    position = 0
    while (start := _DROPPED_LINK.search(text, position)) is not None:
        kept.append(text[position : start.start()])
        depth = 0
        for bracket in _LINK_BRACKET.finditer(text, start.start()):
            depth += 1 if bracket.group() == "[[" else -1
            if depth == 0:
                position = bracket.end()
                break
        else:  # never closed: drop the opening alone
            position = start.end()
    kept.append(text[position:])
    return "".join(kept)


def _clean(title: str, markup: str, min_words: int) -> str:
    """The prose of one article, a line for each heading and each paragraph."""
    text = _OPAQUE.sub("", _REF.sub("", _COMMENT.sub("", markup)))
    text = _substitute_all(_INNER_TABLE, "", text)
    text = _drop_links(_substitute_all(_INNER_TEMPLATE, _expand_template, text))
    text = "\n".join("" if _LIST_LINE.match(line) else line for line in text.splitlines())
    # Headings are read here; strip_code would remove their marks.
    pending: list[tuple[int, str]] = []  # headings which have no prose yet
    dropped_level = 0  # inside a dropped section of this level, if not zero
    lines: list[str] = [f"= {title} ="]
    body: list[str] = []

    def flush() -> None:
        if dropped_level == 0:
            stripped = mwparserfromhell.parse("\n".join(body)).strip_code(normalize=True, collapse=True)
            prose = [line for line in map(_tidy, stripped.splitlines()) if _is_prose(line, min_words)]
            if prose:
                lines.extend(f"{'= ' * level}{name}{' =' * level}" for level, name in pending)
                lines.extend(prose)
                pending.clear()
        body.clear()

    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading is None:
            body.append(line)
            continue
        flush()
        level = len(heading.group(1))
        name = _tidy(mwparserfromhell.parse(heading.group(2)).strip_code())
        if dropped_level == 0 or level <= dropped_level:
            dropped_level = level if name.lower() in _DROPPED_SECTIONS else 0
        pending[:] = [entry for entry in pending if entry[0] < level]
        if dropped_level == 0:
            pending.append((level, name))
    flush()
    return "\n".join(f" {line} " if line.startswith("= ") else line for line in lines) + "\n"


def _tidy(line: str) -> str:
    """One line without the gaps that removed markup leaves behind."""
    line = html.unescape(_MAGIC_WORD.sub("", line))
    line = _LEFT_OVER.sub("", line)
    line = " ".join(line.split())
    line = _AFTER_OPENING.sub(r"\1", _EMPTY_BRACKETS.sub("", line))
    line = _BEFORE_POINT.sub(r"\1", _BEFORE_CLOSING.sub(r"\1", line))
    return " ".join(line.split())


def _is_prose(line: str, min_words: int) -> bool:
    """Whether a line is long enough and free of markup that nothing above could read."""
    return len(line.split()) >= min_words and not any(mark in line for mark in ("{{", "}}", "{|", "||"))


def clean_articles(xml_bz2: bytes, min_words: int = 8) -> list[tuple[str, str]]:
    """Read the articles of a MediaWiki XML dump as plain text.

    Args:
        xml_bz2: The bz2-compressed ``pages-articles`` dump.
        min_words: Paragraphs with fewer whitespace-separated words are dropped (captions, list residue).

    Returns:
        ``(title, text)`` for every non-redirect page of the article namespace that holds prose, in the
        order of the dump.  The text has one line per heading or paragraph, ends with a newline and begins
        with the title as its first heading.
    """
    articles = ((title, _clean(title, markup, min_words)) for title, markup in _pages(xml_bz2))
    return [(title, text) for title, text in articles if text.count("\n") > 1]
