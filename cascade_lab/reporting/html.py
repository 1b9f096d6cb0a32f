"""Turns an executed notebook into one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape, unescape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import mistune
from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner

from cascade_lab.reporting.capture import VALUES_MIME
from cascade_lab.text import exact, shorten, visible

# The browser refuses to load or run anything, even if a text got past the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ORIGIN = "Where this comes from"
_MAX_LENGTH = 120  # characters of a name in the head and in the titles
_MAX_ORIGIN_LENGTH = 600  # characters of a value in the last section


def render_page(cells: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """Return the HTML page: the texts and outputs of the cells (not their code), with a table of contents.

    Parameters
    ----------
    cells : sequence of notebook cells, executed
    record : mapping
        The report's JSON; `runs`, `notebook`, `packages` and `fonts` become the page's last section.
    """
    contents = _Contents()
    render_prose, render_output_text = _markdown(contents, links=True), _markdown(contents, links=False)
    parts = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            parts.append(render_prose(visible(cell["source"])))
        elif cell["cell_type"] == "code":
            parts += filter(None, (_output(output, render_output_text) for output in cell["outputs"]))
    cascade_names = ", ".join(dict.fromkeys(run["name"] for run in record["runs"].values()))
    heading = next((text for level, text, _ in contents.entries if level == 1), None)
    title = _escaped_line(record["notebook"]) if heading is None else re.sub("<[^>]*>", "", heading)
    after_heading = next((i + 1 for i, part in enumerate(parts) if "<h1" in part), 0)
    parts.insert(after_heading, _run_facts(record["runs"]))
    parts.append(f'<section class="origin">{contents.heading(_ORIGIN, 2)}{_origin(record)}</section>')
    css = files("cascade_lab.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – {_escaped_line(cascade_names)}</title>
<style>
{css}</style>
</head>
<body>
<nav aria-label="Contents"><strong>{_escaped_line(cascade_names)}</strong>
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
    """The table of contents: every heading so far, each with its own id."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int) -> str:
        """Add a heading and return it as HTML; `text` is HTML already."""
        base = re.sub(r"\W+", "-", re.sub(r"<[^>]*>|&\w+;", "", text).lower()).strip("-") or "section"
        taken = {anchor for *_, anchor in self.entries}
        anchor, number = base, 2
        while anchor in taken:
            anchor, number = f"{base}-{number}", number + 1
        self.entries.append((level, text, anchor))
        return f'<h{level} id="{escape(anchor)}">{text}</h{level}>\n'

    def html(self) -> str:
        return "\n".join(
            f'<li class="h{level}"><a href="#{escape(anchor)}">{_without_links(text)}</a></li>'
            for level, text, anchor in self.entries
        )


def _without_links(html: str) -> str:
    return re.sub(r"</?a\b[^>]*>", "", html)


def _markdown(contents: _Contents, *, links: bool) -> Callable[[str], str]:
    """Return a function from Markdown to HTML.

    HTML in the Markdown is shown as text, and an image as its description; a link only works if `links` is true.
    """

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **_: Any) -> str:
            return contents.heading(text, level)

        def text(self, text: str) -> str:
            return escape(visible(unescape(text)))  # Markdown reads &lt; as <

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return escape(text)

        def table(self, text: str) -> str:
            return f'<div class="table" tabindex="0"><table>\n{text}</table></div>\n'

    reader = mistune.create_markdown(renderer=Renderer(escape=True), plugins=["table"])
    if not links:
        allowed = ("escape", "codespan", "emphasis", "linebreak", "softbreak")
        reader.inline.rules = [rule for rule in reader.inline.rules if rule in allowed]
        reader.block.rules = [rule for rule in reader.block.rules if rule != "ref_link"]
    return lambda text: str(reader(text))


def _output(output: Mapping[str, Any], render_markdown: Callable[[str], str]) -> str:
    """Return one output of a cell as HTML; stderr is left out, because it is meant for who runs the notebook."""
    if output["output_type"] == "stream":
        return f"<pre>{escape(visible(output['text']))}</pre>\n" if output["name"] == "stdout" else ""
    data, metadata = output.get("data", {}), output.get("metadata", {})
    if "image/svg+xml" in data:
        source = base64.b64encode(data["image/svg+xml"].encode()).decode()
        return _image(f"data:image/svg+xml;base64,{source}", data, {})
    for mime in ("image/png", "image/jpeg"):
        if mime in data:
            source = re.sub(r"\s", "", data[mime])
            return _image(f"data:{mime};base64,{source}", data, metadata.get(mime, {}))
    if "text/markdown" in data:
        return render_markdown(visible(data["text/markdown"]))
    if "text/html" in data:
        html = re.sub(
            r"<table\b.*?</table>", lambda match: _align(match[0]), sanitize(data["text/html"]), flags=re.DOTALL
        )
        return f'<div class="table" tabindex="0">{html}</div>\n'
    if "text/plain" in data and not any("widget" in mime for mime in data):
        return f"<pre>{escape(visible(without_addresses(data['text/plain'])))}</pre>\n"
    return ""


def without_addresses(text: str) -> str:
    """Return the text of a repr without memory addresses, which differ in every process.

    >>> without_addresses("<Run object at 0x7f00de>")
    '<Run object>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _image(source: str, data: Mapping[str, Any], size: Mapping[str, Any]) -> str:
    """Return an image; its description for screen readers is the titles of its axes."""
    all_axes = data.get(VALUES_MIME, {}).get("axes", [])
    description = "; ".join(_escaped_line(axes["title"]) for axes in all_axes if "title" in axes) or "figure"
    width = f' width="{int(size["width"])}"' if "width" in size else ""
    return f'<img alt="{description}" src="{source}"{width}>\n'


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
_CSS_SANITIZER = CSSSanitizer(allowed_css_properties=_PROPERTIES)
_CLEANER = Cleaner(
    tags=_TAGS,
    attributes={
        "*": lambda tag, name, value: (
            name in ("class", "style", "title", "dir", "colspan", "rowspan", "scope")
            or (name == "id" and value.startswith("T_"))
        )
    },
    strip=True,
    css_sanitizer=_CSS_SANITIZER,
)


def sanitize(html: str) -> str:
    """Return a piece of HTML without anything that runs, that is loaded, or that changes the page around it.

    The style rules that pandas' Styler writes are kept; its random ids are replaced by ids that depend on the content.

    >>> sanitize('<b onclick="x()">1<script>alert(1)</script><img src="http://a"></b>')
    '<b>1alert(1)</b>'
    """
    random_ids = dict.fromkeys(re.findall(r'<table id="(T_\w+)"', html))
    rules = []
    for sheet in re.findall(r"<style\b[^>]*>(.*?)</style>", html, flags=re.DOTALL | re.IGNORECASE):
        for selector, declarations in re.findall(r"(#T_[\w#,\s.:-]*)\{([^{}]*)\}", sheet):
            rules.append(f"{selector.strip()} {{{_CSS_SANITIZER.sanitize_css(declarations)}}}")
    style = f"<style>{' '.join(rules)}</style>" if rules else ""
    body = re.sub(r"<style\b.*?</style>", "", html, flags=re.DOTALL | re.IGNORECASE)
    clean = style + str(_CLEANER.clean(visible(_ENTITY.sub(_visible_entity, body)))).strip()
    for random_id in random_ids:
        stable_id = "T_" + sha256(clean.replace(random_id, "").encode()).hexdigest()[:8]
        clean = clean.replace(random_id, stable_id)
    return clean


_ENTITY = re.compile(r"&#?\w+;?")


def _visible_entity(entity: re.Match[str]) -> str:
    """Return an entity as it is, or the visible form of the character that it stands for, such as &#x202e;."""
    character = unescape(entity[0])
    return entity[0] if visible(character) == character else visible(character)


_CELL = re.compile(r"<t([dh])\b([^>]*)>(.*?)</t\1>", re.DOTALL)
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?( \([^a-z]*( to )?[^a-z]*\))?|–|nan|", re.IGNORECASE)


def _align(table: str) -> str:
    """Mark every cell of a table as number, words or text, so that the style sheet aligns numbers right, words left.

    A header is aligned as its column. The contents stay, except that NaN in a column of numbers is shown as –.
    """
    body = table.partition("<tbody>")[2]
    rows = [_CELL.findall(row) for row in body.split("</tr>")]
    columns = zip(*([content for tag, _, content in row if tag == "d"] for row in rows if row), strict=False)
    kinds = ["number" if all(_NUMBER.fullmatch(cell.strip()) for cell in column) else "words" for column in columns]

    def aligned_row(row: str) -> str:
        cells = _CELL.findall(row)
        has_spanning_header = any("colspan" in attributes for _, attributes, _ in cells)
        column_numbers = iter(range(len(kinds) - len(cells), len(kinds)))  # row headers come first: below 0

        def aligned_cell(cell: re.Match[str]) -> str:
            tag, attributes, content = cell.groups()
            column = next(column_numbers)
            kind = "words" if column < 0 or has_spanning_header else kinds[column]
            if kind == "number":
                content = "–" if tag == "d" and content.strip() == "NaN" else content
            elif "<" not in content:
                is_long = len(content) > 40 or any(len(word) > 40 for word in content.split())
                kind, content = "text" if is_long else "words", re.sub(r"_(?=\w)", "_<wbr>", content)
            return f'<t{tag}{attributes} data-kind="{kind}">{content}</t{tag}>'

        return _CELL.sub(aligned_cell, row)

    return "</tr>".join(aligned_row(row) for row in table.split("</tr>"))


def _run_facts(runs: Mapping[str, Any]) -> str:
    """Return one line per run: the cascade, the texts, the thresholds."""
    lines = []
    for parameter, run in runs.items():
        evalset = run["evalset"]
        split = f", {evalset['split']}" if evalset.get("split") else ""
        source = PurePath(evalset.get("source") or evalset.get("path") or "a table").name
        thresholds = ", ".join(
            f"{stage} {exact(value)}" for stage, value in run["thresholds"].items() if value is not None
        )
        facts = {parameter: ""} if len(runs) > 1 else {}
        facts |= {"run": run["run_id"], "cascade": run["name"], "texts": f"{run['n_examples']:,} ({source}{split})"}
        facts["thresholds"] = thresholds or "none"
        items = (f"<div><dt>{_escaped_line(k)}</dt><dd>{_escaped_line(v)}</dd></div>" for k, v in facts.items())
        lines.append(f'<dl class="facts">{"".join(items)}</dl>\n')
    return "".join(lines)


def _origin(record: Mapping[str, Any]) -> str:
    """Return tables with the digests of everything that the report was computed from."""
    tables = []
    for run in record["runs"].values():
        evalset, tuned_on = run["evalset"], run["tuned_on"]
        source = " ".join(filter(None, (evalset.get("source"), evalset.get("split"))))
        rows = [
            ("run", run["run_id"], ""),
            ("made from", run["source"], ""),
            ("started", run["started"], ""),
            ("processor", run["processor"], ""),
            ("manifest.json", "", run["manifest_sha256"]),
            ("eval set", source, evalset.get("sha256")),
        ]
        rows += [(f"threshold of {k}", "none" if v is None else repr(v), "") for k, v in run["thresholds"].items()]
        if tuned_on:
            rows.append(("tuned on", f"run {tuned_on.get('run_id')}: {tuned_on.get('goal')}", ""))
            rows.append(("tuned on, eval set", "", tuned_on.get("evalset", {}).get("sha256")))
        rows += [("table", name, digest) for name, digest in run["contents"].items()]
        rows += [("input", "/".join(PurePath(path).parts[-2:]), digest) for path, digest in run["inputs"].items()]
        rows.append(("the run's packages", package_list(run), ""))
        tables.append(_table(f"The run {run['run_id']}: SHA-256 of its inputs and of its tables", rows))
    parameters = ", ".join(f"{name} = {value!r}" for name, value in record["parameters"].items())
    rows = [("notebook", f"{record['notebook']} {parameters}", record["notebook_sha256"])]
    rows.append(("packages and fonts", package_list(record), ""))
    tables.append(_table("This report", rows))
    introduction = (
        "<p>The same run gives the same report, byte for byte. "
        "<code>cascade-lab verify</code> rebuilds the report and compares.</p>\n"
    )
    return introduction + "".join(tables)


def package_list(record: Mapping[str, Any]) -> str:
    """Return the `packages` of a record, or of a run in it, as the page shows them; and the `fonts` of a record."""
    return ", ".join(f"{name} {version}" for name, version in versions(record).items())


def versions(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the bytes of a report depend on besides its inputs: versions of packages, digests of fonts.

    >>> versions({"packages": {"pandas": "3.0"}, "fonts": {"DejaVuSans.ttf": "3fdf69cabf06049e"}})
    {'pandas': '3.0', 'font DejaVuSans.ttf': '3fdf69cabf06'}
    """
    return record["packages"] | {f"font {name}": str(digest)[:12] for name, digest in record.get("fonts", {}).items()}


def _table(caption: str, rows: Sequence[tuple[str, str | None, str | None]]) -> str:
    """Return a table of name, value and digest, one row each."""

    def html_rows() -> Iterator[str]:
        for name, value, digest in rows:
            digest_html = f' <span class="digest">{_escaped_line(digest)}</span>' if digest else ""
            value_html = _escaped_line(value or "", _MAX_ORIGIN_LENGTH)
            yield f"<tr><th>{_escaped_line(name)}</th><td>{value_html}{digest_html}</td></tr>"

    head = f"<caption>{_escaped_line(caption)}</caption>"
    return f'<div class="table"><table>{head}<tbody>{"".join(html_rows())}</tbody></table></div>\n'


def _escaped_line(text: str, max_length: int = _MAX_LENGTH) -> str:
    """Return a text as HTML on one line, shortened."""
    return escape(visible(shorten(text, max_length)))
