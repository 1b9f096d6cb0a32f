"""Turns an executed notebook into one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape, unescape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import mistune

from cascade_lab.reporting.capture import VALUES_MIME
from cascade_lab.reporting.glossary import glossary_html, link_terms
from cascade_lab.reporting.sanitize import sanitize
from cascade_lab.reporting.tables import csv_link, scrolling_tables, tables_as_csv, values_as_csv
from cascade_lab.text import exact, shorten, visible

# The browser refuses to load or run anything, even if a text got past the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ORIGIN, _GLOSSARY = "Where this comes from", "Glossary"
_SHOW = "show-contents"  # the id of the box that shows the contents on a phone
_PICTURE = '<label class="picture">'
_MAX_LENGTH = 120  # characters of a name in the head and in the titles
_MAX_ORIGIN_LENGTH = 600  # characters of a value in the last section


FIRST_SCREEN = "first-screen"
"""The tag of the cell whose outputs are a report's first screen: the verdict, and pictures side by side below it."""


def render_page(cells: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """Return the HTML page: the texts and outputs of the cells (not their code), with a table of contents.

    The first use of each term is a link to the glossary near the end. Every table has its csv, as a link.

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
            outputs = [_output(output, render_output_text, contents) for output in cell["outputs"]]
            is_first_screen = FIRST_SCREEN in cell.get("metadata", {}).get("tags", [])
            parts += [_first_screen(outputs)] if is_first_screen else outputs
    cascade_names = ", ".join(dict.fromkeys(run["name"] for run in record["runs"].values()))
    heading = next((text for level, text, _ in contents.entries if level == 1), None)
    title = _escaped_line(record["notebook"]) if heading is None else re.sub("<[^>]*>", "", heading)
    after_heading = next((i + 1 for i, part in enumerate(parts) if "<h1" in part), 0)
    parts.insert(after_heading, _run_facts(record["runs"]))
    body, terms = link_terms("".join(parts))
    if terms:
        body += f"<section>{contents.heading(_GLOSSARY, 2)}{glossary_html(terms)}</section>"
    body += f'<section class="origin">{contents.heading(_ORIGIN, 2)}{_origin(record)}</section>'
    names = _escaped_line(cascade_names)
    navigation = (
        f'<nav aria-label="Contents"><input type="checkbox" id="{_SHOW}"><label for="{_SHOW}">Contents</label>'
        f"<strong>{names}</strong>\n<ul>\n{contents.html()}\n</ul></nav>\n"
    )
    return page_html(f"{title} – {names}", f"{navigation}<main>\n{body}\n</main>")


def page_html(title: str, body: str, *, kind: str = "report") -> str:
    """Return a whole page that loads nothing and runs nothing; `title` and `body` are HTML, `kind` is a class."""
    css = files("cascade_lab.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{css}</style>
</head>
<body class="{kind}">
{body}
</body>
</html>
"""


def _first_screen(outputs: Sequence[str]) -> str:
    """Return outputs as the first screen: pictures in one row below everything else."""
    pictures = [output for output in outputs if output.startswith(_PICTURE)]
    words = "".join(output for output in outputs if not output.startswith(_PICTURE))
    return f'<div class="first">{words}<div class="pictures">{"".join(pictures)}</div></div>\n'


class _Contents:
    """The table of contents: every heading so far, each with its own id."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str, str]] = []
        self.n_tables: Counter[str] = Counter()

    def heading(self, text: str, level: int) -> str:
        """Add a heading and return it as HTML; `text` is HTML already."""
        base = re.sub(r"\W+", "-", re.sub(r"<[^>]*>|&\w+;", "", text).lower()).strip("-") or "section"
        taken = {_SHOW, *(anchor for *_, anchor in self.entries)}
        anchor, number = base, 2
        while anchor in taken:
            anchor, number = f"{base}-{number}", number + 1
        self.entries.append((level, text, anchor))
        return f'<h{level} id="{escape(anchor)}">{text}</h{level}>\n'

    def next_name(self) -> str:
        """Return a name for a file with a table of this section, different from all names before."""
        section = self.entries[-1][2] if self.entries else "table"
        self.n_tables[section] += 1
        return f"{section}-{self.n_tables[section]}"

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


def _output(output: Mapping[str, Any], render_markdown: Callable[[str], str], contents: _Contents) -> str:
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
        html, values = sanitize(data["text/html"]), data.get(VALUES_MIME, {})
        texts = [values_as_csv(values)] if values.get("kind") == "table" else tables_as_csv(html)
        links = "".join(csv_link(text, contents.next_name()) for text in texts)
        return f"{scrolling_tables(html)}\n" + (f'<p class="csv">{links}</p>\n' if links else "")
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
    """Return an image, larger after a click. Its description for screen readers is the titles of its axes."""
    all_axes = data.get(VALUES_MIME, {}).get("axes", [])
    description = "; ".join(_escaped_line(axes["title"]) for axes in all_axes if "title" in axes) or "figure"
    width = f' width="{int(size["width"])}"' if "width" in size else ""
    natural = f' style="--width: {int(size["width"])}px"' if "width" in size else ""
    image = f'<img alt="{description}" src="{source}"{width}{natural}>'
    return f'{_PICTURE}<input type="checkbox" aria-label="Enlarge the picture">{image}</label>\n'


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
    summary = "<summary>Digests of all inputs, versions of all packages</summary>"
    return f"{introduction}<details>{summary}{''.join(tables)}</details>\n"


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
