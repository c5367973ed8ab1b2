"""Markdown of models is shown, and can neither run nor load anything."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

pytest.importorskip("markdown_it", reason="the extra `label` is not installed")

from rlhf_pipeline.labelling.markdown import MAX_COLOURED, render, turns

TAGS = {"p", "br", "em", "strong", "s", "code", "pre", "span", "div", "a", "h3", "h4", "h5", "h6"}
TAGS |= {"ul", "ol", "li", "blockquote", "hr", "table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"class", "href", "rel", "target", "tabindex", "role", "aria-label", "start"}

HOSTILE = (
    "<script>hit()</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<img src=x onerror=hit()>",
    "<svg onload=hit()>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "</pre></div></article><script>hit()</script>",
    "<style>@import 'http://evil.example/x.css'</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example/>",
    "[a](javascript:hit())",
    "[a](JaVaScRiPt&colon;hit())",
    "[a](data:text/html,<script>hit()</script>)",
    "[a](vbscript:hit())",
    "[a](//evil.example/x)",
    '[a](http://x.example/"onmouseover="hit() "t")',
    "![a](http://evil.example/x.png)",
    '![a](x" onerror="hit())',
    "[![a](http://evil.example/x.png)](javascript:hit())",
    "<javascript:hit()>",
    "[a]: javascript:hit()\n\n[a]",
    '```"onload=hit()\n</code></pre><script>hit()</script>\n```',
    "```python\n'</span><img src=x onerror=hit()>'\n```",
    "# <img src=x onerror=hit()>",
    "|<img src=x onerror=hit()>|b|\n|-|-|\n|`<script>hit()</script>`|d|",
    "\u202e<script>hit()</script>\u0000",
    "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7 %>",
)


class Found(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    found = Found()
    found.feed(html)
    return found.elements


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_text(text: str) -> None:
    for tag, attributes in elements(render(text)):
        assert tag in TAGS, tag
        assert set(attributes) <= ATTRIBUTES, attributes
        assert str(attributes.get("href", "http://")).startswith(("http://", "https://", "mailto:")), attributes
        assert str(attributes.get("class") or "").isidentifier() or "class" not in attributes


def test_markdown_becomes_html() -> None:
    for text, html in {
        "**a** *b* ~~c~~ `d`": "<p><strong>a</strong> <em>b</em> <s>c</s> <code>d</code></p>",
        "a\nb": "<p>a<br />\nb</p>",
        "# One": "<h3>One</h3>",
        "###### Six": "<h6>Six</h6>",
        "- a\n- b": "<ul>\n<li>a</li>\n<li>b</li>\n</ul>",
        "```c\n1\n```": '<div class="code"><span class="language">c</span><pre tabindex="0" role="group" '
        'aria-label="Code c"><code><span class="nu">1</span></code></pre></div>',
        "    <i>": '<div class="code"><pre tabindex="0" role="group" aria-label="Code">'
        "<code>&lt;i&gt;</code></pre></div>",
        "![w](http://a.example/b)": '<p><span class="unloaded">[picture: w] (http://a.example/b)</span></p>',
    }.items():
        assert render(text) == html, text
    assert render("a\nb", breaks=False) == "<p>a\nb</p>"


def test_a_link_sends_no_referrer_and_shows_where_it_goes() -> None:
    link = '<a href="https://a.example" rel="noreferrer noopener nofollow" target="_blank">'
    assert render("[w](https://a.example)") == (f'<p>{link}w</a> <span class="address">(https://a.example)</span></p>')
    assert render("<https://a.example>") == f"<p>{link}https://a.example</a></p>"
    assert render("[w](http://you:me@a.example)") == '<p>w <span class="address">(http://you:me@a.example)</span></p>'


def test_code_is_the_same_text_coloured_or_not() -> None:
    code = "def f(x):\n\n    return '<b>' # \t &amp;"
    for language in ("python", "no-such-language", ""):
        found = Found()
        kept: list[str] = []
        found.handle_data = kept.append  # type: ignore[method-assign]
        found.feed(render(f"```{language}\n{code}\n```"))
        assert "".join(kept).removeprefix(language).strip("\n") == code, language
    assert "<span" not in render("```python\n" + "1\n" * MAX_COLOURED + "```").replace('<span class="language">', "")


def test_turns_keep_roles_and_the_plain_text() -> None:
    found = turns([{"role": "user", "content": "*a*"}, {"role": "assistant", "content": "b\n"}])
    assert [(turn.role, turn.html, turn.text) for turn in found] == [
        ("user", "<p><em>a</em></p>", "*a*"),
        ("assistant", "<p>b</p>", "b\n"),
    ]
    assert [turn.role for turn in turns("a")] == [""]


def test_cells_are_aligned_by_classes_since_the_policy_forbids_styles() -> None:
    table = render("| a | b | c |\n|:-:|--:|---|\n| 1 | 2 | 3 |")
    assert "style" not in table
    for cell in ('<th class="center">a</th>', '<td class="right">2</td>', "<th>c</th>", "<td>3</td>"):
        assert cell in table
