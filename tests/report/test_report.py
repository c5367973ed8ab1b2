"""The report's form: well-formed, self-contained, escaped, accessible, the same every time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from rlhf_pipeline.report import Results, write_report
from rlhf_pipeline.report.markup import VOID
from rlhf_pipeline.report.page import POLICY
from tests.report.report_fixture import finals, full, plain
from tests.report.report_fixture_page import SECTIONS, SVG, check_closed, page_of, parsed, rows_of, sections, tags

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "</script></style><img src=x onerror=alert(1)><script>alert(2)</script> $x^2$ \\$ &amp; ]]> <!-- "
    "\x00\x08\x1b[31m\x7f\u202eevil\u2066\u200f\ud800\ufffe' onload='x\" onclick=\"y \u05d0\u05d1 "
)
LONG = "z" * 10_000


@pytest.fixture(scope="module")
def text(full_report: Path) -> str:
    return (full_report / "index.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_html_and_xml(text: str) -> None:
    assert text.startswith("<!DOCTYPE html>\n<html ")
    names = [item.tag.removeprefix(SVG) for item in parsed(text).iter()]
    found = [tag for tag, _ in tags(text)]
    assert [name.lower() for name in names] == found  # both parsers read the same elements in the same order
    html = [item.tag for item in parsed(text).iter() if not item.tag.startswith(SVG)]
    assert all(f"<{tag}/>" not in text and f"<{tag} />" not in text for tag in set(html) - VOID)


def test_ids_are_unique_and_whatever_refers_to_one_finds_it(text: str) -> None:
    found = tags(text)
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", text))
    for _, attributes in found:
        wanted |= set((attributes.get("aria-labelledby") or "").split())
        if (attributes.get("href") or "").startswith("#"):
            wanted.add(attributes["href"][1:])
    assert wanted and wanted <= set(ids)


def test_the_page_loads_nothing_and_runs_nothing(text: str, full_report: Path) -> None:
    check_closed(text, full_report)
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"') + text.count("http-equiv")
    meta = [item.attrib for item in parsed(text).iter("meta") if item.get("http-equiv")]
    assert meta == [{"http-equiv": "Content-Security-Policy", "content": POLICY}]
    assert POLICY.startswith("default-src 'none';") and "script" not in POLICY
    # The policy stands before everything that it is to forbid.
    assert text.index("Content-Security-Policy") < text.index("<style>")


def hostile(value: Any, key: str = "") -> Any:
    """The same results with every name and text made hostile, keys that are names included."""
    fixed = {"primary", "figure", "stage", "form", "topic", "method", "split", "kind", "optimum", "bound"}
    named = {"arms", "curves", "configs", "overoptimisation", "responses", "scorers", "parents", "values"}
    if isinstance(value, dict):
        return {
            (k + HOSTILE if key in named else k): hostile(v, key if isinstance(v, str) and key in named else k)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    if not isinstance(value, str) or key in fixed:
        return value
    return value + HOSTILE + (LONG if key in ("text", "configs", "prompt", "headline") else "")


@pytest.mark.check
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    results = finals(full())
    keep = {f"{arm}@v{version}" for arm in ("ppo", "dpo") for version in (1, 2)}  # both settings of the first seed
    # Fewer models with the same sections: every text becomes 10 kB.
    results["rows"] = [r for r in results["rows"] if r["model"] in keep | {"sft@v1"}]
    results["lineage"] = [entry for entry in results["lineage"] if entry["model"] in keep | {"reward@v1"}]
    for key in ("curves", "configs"):
        results[key] = {name: value for name, value in results[key].items() if name in keep}
    results["samples_shown"] = [
        {"prompt": entry["prompt"], "responses": {k: v for k, v in entry["responses"].items() if k in keep}}
        for entry in results["samples_shown"][:1]
    ]
    made = Results.model_validate(hostile(results))
    text = write_report(made, tmp_path).read_text(encoding="utf-8")
    root = parsed(text)
    assert sections(text) == set(SECTIONS)
    check_closed(text)
    assert not [char for char in text if (ord(char) < 32 and char != "\n") or char in "\x7f\u202e\u2066\u200f\ufffe"]
    said = "".join(root.itertext())
    assert "</script></style><img src=x onerror=alert(1)>" in said and "$x^2$" in said and "⟨U+202E⟩" in said
    # In figures too a $ is a $, and the names of arms are cut instead of spoiling the layout.
    assert any("</script>" in (item.text or "") for item in root.iter(f"{SVG}desc"))
    config = next(item for item in root.iter("pre") if "kl_coef: 0.3" in "".join(item.itertext()))
    assert LONG in "".join(config.itertext())
    for path in (tmp_path / "points").glob("*.csv"):
        assert len(rows_of(path)) > 0 and "\x00" not in path.read_text(encoding="utf-8")


@pytest.mark.check
def test_a_dollar_in_a_figure_is_a_dollar() -> None:
    results = plain()
    results["rows"][0] |= {"name": "a$b$c_{d}", "model": "a$b$c_{d}"}
    results["baseline"] = "a$b$c_{d}"
    labels = [item.text for item in parsed(page_of(results)).iter(f"{SVG}text")]
    assert "a$b$c_{d}" in labels


def files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(directory)), path.read_bytes()


@pytest.mark.check
def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = Results.model_validate(full() | {"curves": {}})
    before = results.model_copy(deep=True)
    (tmp_path / "results.json").write_text(results.model_dump_json())
    write_report(results, tmp_path / "a")
    assert results == before  # nothing is written into them
    # Another process, another hash seed, and a user with a taste of his own in figures.
    code = (
        "import sys, pathlib; from rlhf_pipeline.report import load, write_report; import matplotlib; "
        "matplotlib.rcParams.update({'svg.fonttype': 'path', 'axes.facecolor': 'red', 'font.size': 30}); "
        "folder = pathlib.Path(sys.argv[1]); "
        "write_report(load(folder / 'results.json'), folder / 'b')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert dict(files(tmp_path / "a")) == dict(files(tmp_path / "b"))


@pytest.mark.check
def test_the_settings_of_matplotlib_are_put_back() -> None:
    before = dict(matplotlib.rcParams)
    page_of(plain())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.check
def test_the_report_needs_neither_torch_nor_a_display() -> None:
    code = (
        "import sys; from tests.report.report_fixture import plain; "
        "from tests.report.report_fixture_page import page_of; "
        "assert 'matplotlib' not in sys.modules; page_of(plain()); "
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot', 'tkinter') if m in sys.modules])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_figures_and_tables_can_be_read_without_seeing_them(text: str) -> None:
    root = parsed(text)
    plots = [svg for svg in root.iter(f"{SVG}svg") if svg.get("role") == "img" and "plot" in svg.get("class", "")]
    assert len(plots) > 20
    for svg in plots:
        assert svg[0].tag == f"{SVG}title" and svg[0].text and svg[1].tag == f"{SVG}desc" and svg[1].text
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in root.iter("th"))
    for region in root.iter("div"):
        if region.get("class") == "scroll":
            assert region.get("tabindex") == "0" and region.get("aria-label")
    for line in root.iter("tbody"):
        assert all(row[0].tag == "th" for row in line)
    for svg in root.iter(f"{SVG}svg"):
        assert svg.get("role") == "img" or svg.get("aria-hidden") == "true"
