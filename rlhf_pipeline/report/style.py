"""Style of the page: colours and markers of the arms, and the style sheet.

An arm has the same colour and marker everywhere: on light and dark backgrounds, on screen and on paper. The hues follow
Okabe and Ito's palette for colour-blind readers. Each has a light and a dark version, so that coloured text has a
contrast of at least 4.5 to 1 on the page and on panels. Arms also differ in the marker, not only in colour. The style
sheet loads no fonts and no pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_pipeline.report.markup import Markup, h

COLOURS = {
    "page": ("#ffffff", "#101318"),
    "panel": ("#f5f7f9", "#191e25"),
    "ink": ("#191d23", "#e7eaee"),
    "muted": ("#565f6b", "#a3adb9"),
    "line": ("#d5dbe2", "#353d47"),
    "grid": ("#e6eaee", "#272e37"),
    "accent": ("#1f5fc4", "#82b4ff"),
    "warn": ("#9a4b00", "#f2b069"),
    "hue-0": ("#1f5fc4", "#7db2ff"),
    "hue-1": ("#b14d06", "#f2a65e"),
    "hue-2": ("#0a7658", "#4fcb9f"),
    "hue-3": ("#7a3ab2", "#cda2f5"),
    "hue-4": ("#b3306b", "#f58db9"),
    "hue-5": ("#0a6d87", "#5cc8e0"),
    "hue-6": ("#736300", "#d8c74c"),
    "hue-7": ("#745146", "#d3ac9d"),
}
"""Every colour, on a light and on a dark background."""

LIGHT, DARK = (dict(zip(COLOURS, shades)) for shades in zip(*COLOURS.values()))
RESERVED = {"ppo": 0, "dpo": 1, "best-of-n": 2}

# The same shapes as matplotlib's markers, for legends in the text; a box of 12 x 12 around (0, 0).
SHAPES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "s": "M-4 -4H4V4H-4Z",
    "D": "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
    "^": "M0 -5L5 4.2H-5Z",
    "v": "M0 5L5 -4.2H-5Z",
    "P": "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "X": "M-5 -2.8L-2.8 -5L0 -2.2L2.8 -5L5 -2.8L2.2 0L5 2.8L2.8 5L0 2.2L-2.8 5L-5 2.8L-2.2 0Z",
    "h": "M0 -5L4.4 -2.5V2.5L0 5L-4.4 2.5V-2.5Z",
}
MARKERS = tuple(SHAPES)


@dataclass(frozen=True)
class Look:
    """The look of a compared item: the name of its colour, its marker, and whether the marker is filled."""

    hue: str
    marker: str = "o"
    filled: bool = True

    @property
    def css(self) -> str:
        """The colour in CSS."""
        return f"var(--{self.hue})"


NEUTRAL = Look("muted", "o")


def looks(names: Sequence[str], stages: Mapping[str, str] | None = None) -> dict[str, Look]:
    """A look for each name: `ppo`, `ppo@v1` or the first arm of stage ppo has PPO's look, others the next free one.

    Up to 64 names all look different.

    Args:
        stages: the stage of each arm, if it is known.
    """
    stages = stages or {}
    places: dict[str, int] = {}
    for called in (lambda name: name, lambda name: name.partition("@")[0], lambda name: stages.get(name, "")):
        for name in names:
            index = RESERVED.get(called(name))
            if index is not None and name not in places and index not in places.values():
                places[name] = index
    free = [index for index in range(len(MARKERS)) if index not in RESERVED.values()]
    for name in names:
        if name not in places:
            places[name] = free.pop(0) if free else max(len(MARKERS), *(place + 1 for place in places.values()))
    return {name: Look(*_pair(i), filled=name != "best-of-n") for name, i in places.items()}


def _pair(place: int) -> tuple[str, str]:
    """Hue and marker of a place: both differ within the first eight; after them the markers go on by one a round."""
    turn, hue = divmod(place, len(MARKERS))
    return f"hue-{hue}", MARKERS[(hue + turn) % len(MARKERS)]


def swatch(look: Look) -> Markup:
    """The marker of a compared item, for a legend or a table."""
    fill = look.css if look.filled else "none"
    path = h("path", d=SHAPES[look.marker], style=f"fill:{fill};stroke:{look.css};stroke-width:1.6")
    return h("svg", path, class_="swatch", viewBox="-6.5 -6.5 13 13", aria_hidden="true")


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_COLOURS = f"""
:root{{color-scheme:light;{_variables(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{_variables(DARK)}}}}}
"""

_TEXT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1.5rem}
body{margin:0;background:var(--page);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,
 sans-serif}
.sheet{display:grid;grid-template-columns:minmax(0,68rem);justify-content:center;padding:2.5rem 1.25rem 4rem}
h1,h2,h3,h4{line-height:1.25;margin:0;font-weight:650;text-wrap:balance}
h1{font-size:1.9rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.35rem;letter-spacing:-.01em;margin-bottom:.9rem}
h3{font-size:1.02rem;margin:1.9rem 0 .7rem}
p,ul{margin:0 0 .9rem;max-width:46rem}
a{color:var(--accent);text-underline-offset:.15em}
b{font-weight:620}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.875em}
code{overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
main>section{padding-top:2.4rem;margin-top:2.4rem;border-top:1px solid var(--line)}
header p.lead{color:var(--muted);margin:.3rem 0 0}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;margin:1.2rem 0 0;padding:0;font-size:.875rem;
 max-width:none}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--accent);text-decoration:underline}
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--muted);font-size:.875rem}
"""

_VERDICT = """
main>section.verdict{border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:6px;
 background:var(--panel);
 padding:1.3rem 1.5rem;margin-top:1.6rem}
.eyebrow{font-size:.78rem;letter-spacing:.06em;text-transform:uppercase;color:var(--muted);margin-bottom:.4rem}
.headline{font-size:1.4rem;line-height:1.35;font-weight:620;letter-spacing:-.01em;margin-bottom:1rem;text-wrap:pretty}
.headline:last-child{margin-bottom:0}
.verdict dl{display:block}
.verdict dl>div{display:grid;grid-template-columns:9.5rem minmax(0,1fr);gap:.2rem 1rem;padding:.45rem 0;
 border-top:1px solid var(--line)}
.verdict dt{font-size:.875rem;padding-top:.1rem}
.verdict dd ul{list-style:none;padding:0;margin:0;max-width:none}
.verdict dd li+li{margin-top:.25rem}
.note{color:var(--muted);font-size:.875rem}
.chip{display:inline-block;border:1px dashed var(--warn);color:var(--warn);border-radius:99px;padding:0 .55em;
 font-size:.75rem;line-height:1.5;
 white-space:nowrap;vertical-align:.08em;font-weight:500}
.chip.quiet{border:1px solid var(--line);color:var(--muted)}
.good{color:var(--hue-2)}
.bad{color:var(--warn)}
.aside{border-left:3px solid var(--warn);padding-left:1rem}
dl{margin:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.9rem 1.5rem}
main>dl{margin-top:1.6rem}
dt{color:var(--muted);font-size:.8rem}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dl.glossary{grid-template-columns:minmax(0,1fr);gap:.55rem}
.glossary div{display:grid;grid-template-columns:9.5rem minmax(0,1fr);gap:.1rem 1rem}
.glossary dt{font-size:.9rem;color:var(--ink);font-weight:600}
.glossary dd{font-size:.9rem}
.formula{color:var(--muted);white-space:normal}
.formula::before{content:"\\2003"}
.findings{padding-left:0;list-style:none;max-width:none}
.findings li{margin:.25rem 0}
"""

_TABLES = """
figure{margin:0 0 1.6rem}
figcaption{color:var(--muted);font-size:.85rem;line-height:1.5;margin-top:.6rem;max-width:52rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums;line-height:1.4}
th,td{text-align:left;padding:.42rem .7rem;vertical-align:top;border-bottom:1px solid var(--grid)}
tbody:last-child tr:last-child>*{border-bottom:0}
tbody+tbody tr:first-child>*{border-top:1px solid var(--line)}
thead th{color:var(--muted);font-weight:550;font-size:.8rem;background:var(--panel);
 border-bottom:1px solid var(--line);vertical-align:bottom;
 white-space:nowrap}
tbody th{font-weight:450;white-space:nowrap}
tbody tr.group th{font-weight:620}
tr.group .note{margin-left:.6rem;font-weight:400}
.where{display:inline-block;min-width:11rem}
.tight{white-space:nowrap}
td .why{white-space:normal;color:var(--muted);display:inline-block;min-width:9rem}
.n{text-align:right}
td.n{white-space:nowrap}
td b{font-weight:560}
.ci,.none,.bound{color:var(--muted)}
.ci{font-size:.92em}
.bound b{font-weight:450}
tr.marked>*{background:var(--panel)}
.arm{display:inline-flex;align-items:baseline;gap:.4em}
.swatch{width:.8em;height:.8em;flex:none;transform:translateY(.06em);overflow:visible}
.bar{width:160px;height:18px;display:block;fill:none}
"""

_CHARTS = """
.chart{margin-top:.4rem}
.plot{display:block;width:100%;height:auto;font-size:12px;font-variant-numeric:tabular-nums}
.plot text{font-family:inherit!important}
.plot *{stroke-linejoin:round;stroke-linecap:butt}
.plot.narrow{display:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:0 0 .5rem;font-size:.85rem;
 max-width:none}
.legend li{display:flex;align-items:baseline;gap:.4em}
.key{display:inline-block;width:1.5em;height:0;border-top:2.4px solid;align-self:center}
.key.dashed{border-top:1.6px dashed}
.key.thin{border-top:1.3px solid var(--ink)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17.5rem),1fr));gap:1.2rem 1.4rem;
 align-items:start}
.panels.pair{grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),26.5rem))}
"""

_SAMPLES = """
details{margin:0 0 .8rem}
summary{cursor:pointer;color:var(--accent);font-size:.9rem;padding:.15rem 0}
summary code{overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.8rem 1rem;overflow-x:auto;
 margin:.4rem 0 1rem;line-height:1.45}
pre code{overflow-wrap:normal}
.command{white-space:pre-wrap}
.sample{margin:0 0 2rem}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);
 padding-left:.8rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13.5rem),1fr));gap:.9rem}
.cards+details{margin-top:.6rem}
.card{border:1px solid var(--line);border-top:3px solid var(--line);border-radius:6px;padding:.7rem .9rem .3rem;
 min-width:0}
.card h4{font-size:.85rem;font-weight:600;overflow-wrap:anywhere}
.card>div{border-top:1px solid var(--grid);padding:.5rem 0 .4rem;margin-top:.5rem}
.said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .35rem;font-size:.93rem}
.long summary{color:inherit;white-space:pre-wrap;overflow-wrap:anywhere}
.scores{display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:0 0 .2rem;font-size:.8rem;color:var(--muted);
 font-variant-numeric:tabular-nums}
.scores b{color:var(--ink);font-weight:560}
.configs details{margin:0;border-bottom:1px solid var(--grid);padding:.15rem 0}
"""

_NARROW = """
@media screen and (max-width:640px){
 body{font-size:15.5px}
 .sheet{padding:1.5rem 1rem 3rem}
 h1{font-size:1.55rem}
 .headline{font-size:1.2rem}
 main>section.verdict{padding:1rem 1.1rem}
 .verdict dl>div,.glossary div{grid-template-columns:minmax(0,1fr)}
 dl{grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr))}
 .plot.wide{display:none}
 .plot.narrow{display:block}
 th,td{padding:.4rem .55rem}
}
"""

_PRINT = """
@media print{
 @page{margin:14mm 13mm}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 html{font-size:12px}
 body{font-size:9.6pt;line-height:1.45}
 .sheet{display:block;padding:0}
 nav,.screen{display:none}
 main>section{border-top:0;padding-top:0;margin-top:0;break-before:page}
 main>section.verdict,main>section#fair,main>section#results,main>section#glossary{break-before:auto;margin-top:1.4rem}
 main>section.verdict,main>section#fair{break-inside:avoid}
 main>section.verdict{padding:.8rem 1rem}
 h1{font-size:18pt}
 h2{font-size:13pt}
 .headline{font-size:12.5pt;margin-bottom:.6rem}
 .verdict dl>div{padding:.2rem 0}
 h2,h3,h4,tr.group{break-after:avoid}
 .chart,tr,.card,.sample .prompt,.glossary div,.legend{break-inside:avoid}
 .panels>*,.plot{break-inside:avoid}
 .panels,.panels.pair{grid-template-columns:1fr 1fr}
 .scroll{overflow:visible;border:0}
 table{font-size:7.2pt;width:100%}
 thead th{font-size:1em}
 thead{display:table-header-group}
 th,td{padding:2pt 2.6pt;white-space:normal}
 tbody th,thead th,td.n{white-space:normal}
 .ci{display:inline-block;white-space:nowrap;font-size:6.4pt}
 .where{min-width:0}
 .bar{width:26mm;height:auto}
 .unfold::details-content{content-visibility:visible;display:block;block-size:auto}
 a{color:inherit;text-decoration:none}
 pre{white-space:pre-wrap}
 figcaption{font-size:8pt}
}
"""

CSS = "".join((_COLOURS, _TEXT, _VERDICT, _TABLES, _CHARTS, _SAMPLES, _NARROW, _PRINT))
