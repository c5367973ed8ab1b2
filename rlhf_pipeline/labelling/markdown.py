"""Markdown of prompts and responses as HTML that can neither run nor load anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Part, Text
from rlhf_pipeline.labelling.security import is_web
from rlhf_pipeline.report.markup import Markup, h, join, safe
from rlhf_pipeline.report.text import clean

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

MAX_COLOURED = 20_000
"""Characters of a code block that are coloured; longer ones are shown plain, since colouring takes time."""

# Pygments' kinds of words, by the first letters of their short names, and the classes of label.css.
COLOURED = {"k": "kw", "s": "st", "c": "co", "m": "nu", "nf": "fn", "nc": "fn", "nb": "kw", "nt": "kw", "na": "fn"}
SIDES = ("left", "center", "right")
NEEDS_LABEL = (
    "the labelling page needs packages that are not installed; "
    'expected the extra `label`; run: pip install "rlhf-pipeline[label]"'
)


def render(text: str, *, breaks: bool = True) -> str:
    """CommonMark with tables and struck words as HTML.

    HTML in the text is shown as text. A picture is shown as its words and address, never loaded. A link to http, https
    or mail opens in a new tab, sends no referrer, and is followed by its address where that differs from its words.

    breaks: whether the end of a line ends the line on the page too.
    """
    return _markdown(breaks).render(clean(text)).strip()


class Turn(Part):
    """One turn of a prompt or response: its Markdown as safe HTML, and the plain text. role: empty for a text alone."""

    role: str
    html: str
    text: str


def turns(text: Text) -> list[Turn]:
    """The turns of a prompt or response."""
    messages = [{"role": "", "content": text}] if isinstance(text, str) else text
    return [
        Turn(
            role=clean(message.get("role", "")),
            html=render(message.get("content") or ""),
            text=clean(message.get("content") or ""),
        )
        for message in messages
    ]


@lru_cache(maxsize=2)
def _markdown(breaks: bool) -> MarkdownIt:
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise BadInput(NEEDS_LABEL) from error
    made = MarkdownIt("commonmark", {"html": False, "breaks": breaks, "maxNesting": 40})
    made.enable(["table", "strikethrough"])
    for name, rule in RULES.items():
        made.add_render_rule(name, rule)
    return made


def _image(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    token = tokens[index]
    return h("span", f"[picture: {token.content or 'no words'}] ({token.attrs.get('src', '')})", class_="unloaded")


def _link_open(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    address = str(tokens[index].attrs.get("href", ""))
    if not is_web(address):
        return ""
    return h("a", href=address, rel="noreferrer noopener nofollow", target="_blank").removesuffix("</a>")


def _link_close(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    # A link holds no link, so the nearest opening before it is its own.
    start = next(i for i in range(index, -1, -1) if tokens[i].type == "link_open")
    address = str(tokens[start].attrs.get("href", ""))
    words = "".join(token.content for token in tokens[start:index]).strip()
    after = (
        "" if words in (address, address.removeprefix("mailto:")) else f" {h('span', f'({address})', class_='address')}"
    )
    return f"{'</a>' if is_web(address) else ''}{after}"


def _heading(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    # The page has h1 and h2 of its own.
    return f"<{'/' if tokens[index].nesting < 0 else ''}h{min(6, int(tokens[index].tag[1]) + 2)}>"


def _table_open(*_: object) -> str:
    return '<div class="wide" tabindex="0" role="group" aria-label="Table"><table>'


def _table_close(*_: object) -> str:
    return "</table></div>"


def _cell_open(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    # markdown-it aligns by a style, which the page's policy forbids.
    side = next((one for one in SIDES if str(tokens[index].attrs.get("style", "")).endswith(one)), None)
    return h(tokens[index].tag, class_=side).removesuffix(f"</{tokens[index].tag}>")


def _code(_: object, tokens: Sequence[Token], index: int, *rest: object) -> str:
    token = tokens[index]
    language = next(iter(token.info.split()), "")[:30]
    inside = h("code", _coloured(token.content.removesuffix("\n"), language))
    # A box that scrolls must be reachable from the keyboard.
    box = h("pre", inside, tabindex="0", role="group", aria_label=f"Code {language}".strip())
    return h("div", h("span", language, class_="language") if language else None, box, class_="code")


RULES: dict[str, Callable[..., str]] = {
    "image": _image,
    "link_open": _link_open,
    "link_close": _link_close,
    "heading_open": _heading,
    "heading_close": _heading,
    "table_open": _table_open,
    "table_close": _table_close,
    "th_open": _cell_open,
    "td_open": _cell_open,
    "fence": _code,
    "code_block": _code,
}
"""How these tokens become HTML: (renderer, tokens, index of the token, options, environment) -> HTML."""


def _coloured(code: str, language: str) -> Markup:
    """Escaped code, its words in spans with a class where the language is known."""
    if not language or len(code) > MAX_COLOURED:
        return safe(code)
    try:
        from pygments.lexers import get_lexer_by_name
        from pygments.token import STANDARD_TYPES
        from pygments.util import ClassNotFound
    except ImportError:
        return safe(code)
    try:
        words = list(get_lexer_by_name(language, stripnl=False, ensurenl=False).get_tokens(code))
    except ClassNotFound:
        return safe(code)
    looks = [STANDARD_TYPES.get(kind, "") for kind, _ in words]
    classes = [COLOURED.get(short[:2]) or COLOURED.get(short[:1]) for short in looks]
    return join(h("span", word, class_=look) if look else word for (_, word), look in zip(words, classes))
