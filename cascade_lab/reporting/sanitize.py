"""Makes a piece of HTML harmless: nothing in it runs, is loaded, or changes the page around it."""

from __future__ import annotations

import re
from hashlib import sha256
from html import unescape

from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner

from cascade_lab.text import visible

# fmt: off
_TAGS = [
    "table", "caption", "colgroup", "col", "thead", "tbody", "tfoot", "tr", "th", "td", "div", "span", "p", "br", "b",
    "strong", "i", "em", "u", "mark", "code", "pre", "ul", "ol", "li", "sup", "sub", "bdi", "details", "summary",
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
    A `<details>` is kept, and is closed.

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
