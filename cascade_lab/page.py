"""An executed notebook as one HTML page that needs nothing else, and in which a text is only ever a text."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape, unescape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import mistune
from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner

from cascade_lab.recorder import MIME

# Nothing is fetched and nothing runs, whatever got past the escaping: the browser sees to that.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ORIGIN = "Where this comes from"


def page(cells: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """Return the page: what the cells say and show (not their code), under a table of contents.

    Parameters
    ----------
    cells : sequence of notebook cells, executed
    record : mapping
        The report's JSON; `runs`, `notebook` and `packages` become the page's last section.
    """
    contents = _Contents()
    prose, data = _markdown(contents, links=True), _markdown(contents, links=False)
    parts = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            parts.append(prose(_visible(cell["source"])))
        elif cell["cell_type"] == "code":
            parts += [html for number, output in enumerate(cell["outputs"]) if (html := _output(output, data))]
    name = ", ".join(dict.fromkeys(run["name"] for run in record["runs"].values()))
    title = next((re.sub("<[^>]*>", "", text) for level, text, _ in contents.entries if level == 1), record["notebook"])
    facts = _facts(record["runs"])
    place = next((i + 1 for i, part in enumerate(parts) if "<h1" in part), 0)
    parts = [*parts[:place], facts, *parts[place:]]
    parts.append(f'<section class="origin">{contents.heading(_ORIGIN, 2)}{_origin(record)}</section>')
    css = files("cascade_lab").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – {escape(_short(_visible(name)))}</title>
<style>
{css}</style>
</head>
<body>
<nav aria-label="Contents"><strong>{escape(_short(_visible(name)))}</strong>
<ul>
{contents.html()}
</ul></nav>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


class _Contents:
    """The headings so far, each with an id of its own."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int) -> str:
        """Return a heading as HTML; `text` is HTML already."""
        words = re.sub(r"\W+", "-", re.sub(r"<[^>]*>|&\w+;", "", text).lower()).strip("-") or "section"
        taken = {known for *_, known in self.entries}
        anchor = next(a for n in range(1, 10**6) if (a := words if n == 1 else f"{words}-{n}") not in taken)
        self.entries.append((level, text, anchor))
        return f'<h{level} id="{escape(anchor)}">{text}</h{level}>\n'

    def html(self) -> str:
        plain = [(level, re.sub(r"</?a\b[^>]*>", "", text), anchor) for level, text, anchor in self.entries]
        return "\n".join(f'<li class="h{n}"><a href="#{escape(a)}">{text}</a></li>' for n, text, a in plain)


def _markdown(contents: _Contents, *, links: bool) -> Any:
    """Return a Markdown reader; HTML stays text, a picture is its description, and without `links` so are they."""

    class Prose(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **_: Any) -> str:
            return contents.heading(text, level)

        def text(self, text: str) -> str:
            return escape(unescape(text))  # Markdown reads &lt; as <

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return escape(text)

    reader = mistune.create_markdown(renderer=Prose(escape=True), plugins=["table"])
    if not links:
        kept = ("escape", "codespan", "emphasis", "linebreak", "softbreak")
        reader.inline.rules = [rule for rule in reader.inline.rules if rule in kept]
        reader.block.rules = [rule for rule in reader.block.rules if rule != "ref_link"]
    return reader


def _output(output: Mapping[str, Any], markdown: Any) -> str:
    """Return one output of a cell as HTML; what went to stderr is for who runs the notebook, not for its readers."""
    if output["output_type"] == "stream":
        return f"<pre>{escape(_visible(output['text']))}</pre>\n" if output["name"] == "stdout" else ""
    data, metadata = output.get("data", {}), output.get("metadata", {})
    if "image/svg+xml" in data:
        source = base64.b64encode(data["image/svg+xml"].encode()).decode()
        return _image(f"data:image/svg+xml;base64,{source}", data, {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            source = re.sub(r"\s", "", data[kind])
            return _image(f"data:{kind};base64,{source}", data, metadata.get(kind, {}))
    if "text/markdown" in data:
        return markdown(_visible(data["text/markdown"]))
    if "text/html" in data:
        tables = re.sub(r"<table\b.*?</table>", lambda table: _set(table[0]), clean(data["text/html"]), flags=re.DOTALL)
        return f'<div class="table">{tables}</div>\n'
    if "text/plain" in data and not any("widget" in kind for kind in data):
        return f"<pre>{escape(_visible(without_addresses(data['text/plain'])))}</pre>\n"
    return ""


def without_addresses(text: str) -> str:
    """Return the text of a repr without places in memory, which no two processes share.

    >>> without_addresses("<Run object at 0x7f00de>")
    '<Run object>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _image(source: str, data: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    shown = data.get(MIME, {}).get("axes", [])
    said = "; ".join(_short(axes["title"]) for axes in shown if "title" in axes) or "figure"
    width = f' width="{int(size["width"])}"' if "width" in size else ""
    return f'<img alt="{escape(_visible(said))}" src="{source}"{width}>\n'


# fmt: off
_TAGS = [
    "table", "caption", "colgroup", "col", "thead", "tbody", "tfoot", "tr", "th", "td", "div", "span", "p", "br", "b",
    "strong", "i", "em", "u", "mark", "code", "pre", "ul", "ol", "li", "sup", "sub",
]
_PROPERTIES = [
    "background", "background-color", "border", "border-bottom", "border-left", "border-radius", "border-right",
    "border-top", "color", "display", "font-family", "font-size", "font-style", "font-weight", "line-height", "margin",
    "max-width", "min-width", "opacity", "padding", "text-align", "text-decoration", "vertical-align", "white-space",
    "width",
]
# fmt: on
_CSS = CSSSanitizer(allowed_css_properties=_PROPERTIES)
_CLEANER = Cleaner(
    tags=_TAGS,
    attributes={
        "*": lambda tag, name, value: (
            name in ("class", "style", "title", "dir", "colspan", "rowspan", "scope")
            or (name == "id" and value.startswith("T_"))
        )
    },
    strip=True,
    css_sanitizer=_CSS,
)


def clean(html: str) -> str:
    """Return a table or words in HTML without anything that runs, is fetched, or reaches beyond it.

    The rules that pandas' Styler writes are kept; its random ids become the same in every process.

    >>> clean('<b onclick="x()">1<script>alert(1)</script><img src="http://a"></b>')
    '<b>1alert(1)</b>'
    """
    ids = dict.fromkeys(re.findall(r'<table id="(T_\w+)"', html))
    rules = []
    for sheet in re.findall(r"<style\b[^>]*>(.*?)</style>", html, flags=re.DOTALL | re.IGNORECASE):
        for selector, body in re.findall(r"(#T_[\w#,\s.:-]*)\{([^{}]*)\}", sheet):
            rules.append(f"{selector.strip()} {{{_CSS.sanitize_css(body)}}}")
    body = re.sub(r"<style\b.*?</style>", "", html, flags=re.DOTALL | re.IGNORECASE)
    made = (f"<style>{' '.join(rules)}</style>" if rules else "") + _CLEANER.clean(_visible(body)).strip()
    for known in ids:
        made = made.replace(known, "T_" + sha256(made.replace(known, "").encode()).hexdigest()[:8])
    return made


_CELL = re.compile(r"<t([dh])\b([^>]*)>(.*?)</t\1>", re.DOTALL)
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?( \([^a-z]*( to )?[^a-z]*\))?|–|nan|", re.IGNORECASE)


def _set(table: str) -> str:
    """Set a table as a printer would: numbers to the right and words to the left, each under its header.

    What a cell says stays the same, but for NaN in a column of numbers, which is undefined and shown as –.
    """
    body = table.partition("<tbody>")[2]
    rows = [_CELL.findall(row) for row in body.split("</tr>")]
    columns = list(zip(*([said for kind, _, said in row if kind == "d"] for row in rows if row), strict=False))
    kinds = ["number" if all(map(_NUMBER.fullmatch, map(str.strip, column))) else "words" for column in columns]

    def row_of(row: str) -> str:
        cells = _CELL.findall(row)
        spread = any("colspan" in attributes for _, attributes, _ in cells)
        first = len(cells) - len(kinds)  # headers of rows stand before

        def cell(found: re.Match[str], place: Iterator[int]) -> str:
            tag, attributes, said = found.groups()
            at = next(place) - first
            kind = "words" if at < 0 or spread else kinds[at]
            if kind == "number":
                said = "–" if tag == "d" and said.strip() == "NaN" else said
            elif "<" not in said:
                long = len(said) > 40 or any(len(word) > 40 for word in said.split())
                kind, said = "text" if long else "words", re.sub(r"_(?=\w)", "_<wbr>", said)
            return f'<t{tag}{attributes} data-kind="{kind}">{said}</t{tag}>'

        place = iter(range(len(cells)))
        return _CELL.sub(lambda found: cell(found, place), row)

    return "</tr>".join(map(row_of, table.split("</tr>")))


def _facts(runs: Mapping[str, Any]) -> str:
    """Return each run in a line: the cascade, the texts, the thresholds."""
    lines = []
    for parameter, run in runs.items():
        evalset = run["evalset"]
        split = f", {evalset['split']}" if evalset.get("split") else ""
        source = PurePath(evalset.get("source") or evalset.get("path") or "a table").name
        thresholds = ", ".join(f"{key} {value:.4g}" for key, value in run["thresholds"].items() if value is not None)
        facts = {"run": run["run_id"], "cascade": run["name"], "texts": f"{run['n_examples']:,} ({source}{split})"}
        facts["thresholds"] = thresholds or "none"
        if len(runs) > 1:
            facts = {parameter: "", **facts}
        said = [f"<div><dt>{escape(k)}</dt><dd>{escape(_visible(_short(v)))}</dd></div>" for k, v in facts.items()]
        lines.append(f'<dl class="facts">{"".join(said)}</dl>\n')
    return "".join(lines)


def _origin(record: Mapping[str, Any]) -> str:
    """Return the digests of everything that the figures come from, as tables."""
    tables = []
    for run in record["runs"].values():
        rows = [("run", run["run_id"], ""), ("started", run["started"] or "", ""), ("processor", run["processor"], "")]
        rows.append(("manifest.json", "", run["manifest_sha256"]))
        evalset = run["evalset"]
        source = " ".join(filter(None, (evalset.get("source"), evalset.get("split"))))
        rows.append(("eval set", source, evalset.get("sha256") or ""))
        rows += [(f"threshold of {k}", "none" if v is None else repr(v), "") for k, v in run["thresholds"].items()]
        tuned = run["tuned_on"]
        if tuned:
            rows.append(("tuned on", f"run {tuned.get('run_id')}: {tuned.get('goal')}", ""))
            rows.append(("tuned on, eval set", "", tuned.get("evalset", {}).get("sha256") or ""))
        rows += [("table", name, digest) for name, digest in run["contents"].items()]
        rows += [("model", "/".join(PurePath(name).parts[-2:]), digest) for name, digest in run["inputs"].items()]
        versions = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
        rows.append(("the run's packages", versions, ""))
        tables.append(_rows(f"The run {run['run_id']}: SHA-256 of all that it was made of, and of its tables", rows))
    given = ", ".join(f"{key} = {value!r}" for key, value in record["parameters"].items())
    rows = [("notebook", f"{record['notebook']} {given}", record["notebook_sha256"])]
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in record["packages"].items()), ""))
    tables.append(_rows("This report", rows))
    say = "<p>The same run gives the same report, byte for byte; <code>cascade-lab verify</code> makes it again.</p>\n"
    return say + "".join(tables)


def _rows(caption: str, rows: Sequence[tuple[str, Any, str]]) -> str:
    def cells() -> Iterator[str]:
        for name, value, digest in rows:
            words = escape(_visible(_short(str(value or ""), 600)))
            digits = f' <span class="digest">{escape(digest)}</span>' if digest else ""
            yield f"<tr><th>{escape(name)}</th><td>{words}{digits}</td></tr>"

    body = "".join(cells())
    return f'<div class="table"><table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table></div>\n'


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _visible(text: str) -> str:
    """Return a text with its control characters as the pictures that Unicode has for them.

    >>> _visible("a\\x00b\\x7f")
    'a␀b␡'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda c: "\u2421" if c[0] == "\x7f" else chr(0x2400 + ord(c[0])), text)
