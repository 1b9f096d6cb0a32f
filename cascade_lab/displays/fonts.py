"""Finds fonts for labels in any script, for the figures of this package alone; says once what no font has.

Matplotlib draws a text with the fonts of its own list only. So each text of a figure gets the fonts that its characters
need, behind the fonts that it has. The settings of the user's other figures stay as they are.

Matplotlib 3.11 shapes Arabic and Indic letters and writes Arabic and Hebrew from right to left. Matplotlib 3.10, which
is used with Python 3.10, does neither: it draws such letters unjoined and from left to right.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from cascade_lab.exceptions import FontWarning
from cascade_lab.provenance import sha256

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_FAMILIES = ("DejaVu Sans",)
"""The fonts of matplotlib's own settings, with which a report is drawn."""

# The first font that has a character draws it. Packages of the extra `cjk`, and what Linux, macOS and Windows bring.
# Fonts in colours are left out: matplotlib cannot draw them.
_PACKAGES = ("noto_cjk_sans_otc", "manimgx_fonts")
_CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Microsoft YaHei",
    "Hiragino Sans GB", "Heiti SC", "STHeiti", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "DengXian",
    "Noto Sans CJK TC", "Noto Sans TC", "Source Han Sans TC", "PingFang TC", "PingFang HK", "Heiti TC",
    "Microsoft JhengHei", "SimSun", "AR PL UMing CN", "AR PL UKai CN", "Droid Sans Fallback",
)  # fmt: skip
_JAPANESE = (
    "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "Hiragino Sans", "Hiragino Kaku Gothic ProN",
    "Yu Gothic", "Meiryo", "MS Gothic", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic",
)  # fmt: skip
_KOREAN = (
    "Noto Sans CJK KR", "Noto Sans KR", "Source Han Sans KR", "Apple SD Gothic Neo", "AppleGothic", "Malgun Gothic",
    "NanumGothic", "UnDotum",
)  # fmt: skip
_OTHER = (
    "Noto Sans Arabic", "Noto Naskh Arabic", "Geeza Pro", "Noto Sans Hebrew", "Arial Hebrew", "Noto Sans Thai",
    "Noto Sans Thai Looped", "Thonburi", "Leelawadee UI", "Loma", "Noto Sans Devanagari", "Kohinoor Devanagari",
    "Nirmala UI", "Segoe UI", "Tahoma", "Noto Emoji", "Segoe UI Symbol", "Segoe UI Emoji", "Apple Symbols", "Symbola",
    "FreeSans", "Arial Unicode MS", "Unifont",
)  # fmt: skip
_NOTO = "Noto Sans "  # any other family of this name is tried last
_KANA, _HANGUL = re.compile("[\u3041-\u30ff]"), re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]")

_MAX_NAMED = 12  # characters in the warning
_missing_so_far: set[str] = set()  # characters that matplotlib need not warn of again


def add_fonts(ax: Axes) -> None:
    """Give every text of `ax` the fonts that its characters need, behind its own fonts.

    A text whose fonts have all its characters is left as it is. Where no font has a character, `warn_of_missing` says
    so.
    """
    from matplotlib.text import Text

    texts = [artist for artist in ax.findobj(Text) if isinstance(artist, Text) and not artist.get_text().isascii()]
    all_text = "".join(text.get_text() for text in texts)
    missing: set[str] = set()
    for text in texts:
        if text.get_fontproperties().get_file() is None:
            families = text.get_fontfamily()
            further, without_font = _further_families(text.get_text(), families, all_text)
            missing |= without_font
            if further:
                text.set_fontfamily([*families, *further])
    _warn(missing)


def font_digests(text: str) -> dict[str, str]:
    """Return the SHA-256 of each font file that draws a text in a report, by the name of the file.

    >>> list(font_digests("abc"))
    ['DejaVuSans-Bold.ttf', 'DejaVuSans-Oblique.ttf', 'DejaVuSans.ttf']
    >>> font_digests("")
    {}
    """
    if not text:
        return {}
    families = [*DEFAULT_FAMILIES, *_further_families(text, DEFAULT_FAMILIES, text)[0]]
    styles: list[dict[str, Any]] = [{}, {"weight": "bold"}, {"style": "italic"}]
    paths = {Path(path) for family in families for style in styles if (path := _font_file(family, **style))}
    return {path.name: sha256(path) for path in sorted(paths, key=lambda path: path.name)}


def warn_of_missing(text: str) -> None:
    """Warn, once in a process, if no font has a character of a text: one line that names characters and the way out.

    Matplotlib's own warnings of those characters are turned off, because it gives one for each character.
    """
    _warn(_further_families(text, DEFAULT_FAMILIES, text)[1])


def _warn(missing: set[str]) -> None:
    if missing <= _missing_so_far:
        return
    is_first = not _missing_so_far
    _missing_so_far.update(missing)
    codes = "|".join(str(ord(character)) for character in sorted(_missing_so_far))
    warnings.filterwarnings("ignore", rf"Glyph ({codes}) \(|Matplotlib currently does not support", UserWarning)
    if is_first:
        letters = [character for character in sorted(missing) if not category(character).startswith("M")]
        named = " ".join((letters or sorted(missing))[:_MAX_NAMED]) + (" …" if len(missing) > _MAX_NAMED else "")
        has_packages = all(find_spec(name) for name in _PACKAGES)
        extra = "" if has_packages else "pip install 'cascade-lab[cjk]', or "
        warnings.warn(
            f"figures: no font of this machine has {named}, so figures show boxes for such characters; install one: "
            f"{extra}a Noto Sans font of this script",
            FontWarning,
            stacklevel=4,
        )


def _further_families(text: str, families: Sequence[str], context: str) -> tuple[list[str], set[str]]:
    """Return the families that a text needs behind `families`, and the characters that no family has.

    `context` is all text of the figure: Chinese characters look different in Japanese and in Korean, so kana or Hangul
    anywhere in a figure put the fonts for that language first.
    """
    files = {_font_file(family) for family in families} - {None} or {_font_file(DEFAULT_FAMILIES[0])}
    missing = {character for character in text if character > " "}.difference(*map(_characters, files))
    further: list[str] = []
    for family in _installed_families(context) if missing else []:
        if found := missing & _characters(_font_file(family)):
            further.append(family)
            missing -= found
    return further, missing


@lru_cache
def _characters(file: str | None) -> frozenset[str]:
    """Return the characters that a font file has; none for a file that cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(file).get_charmap())) if file else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


def _font_file(family: str, **style: Any) -> str | None:
    """Return the file of a family, or of an alias such as `sans-serif`; None where it is not installed.

    From matplotlib 3.11 on, the str also carries the number of the font in its file.
    """
    from matplotlib.font_manager import FontProperties, findfont

    try:
        return findfont(FontProperties(family=[family], **style), fallback_to_default=False)
    except ValueError:
        return None


def _installed_families(context: str) -> list[str]:
    """Return the families to try, in order: those listed above, then any other Noto Sans."""
    from matplotlib.font_manager import fontManager

    _add_packages()
    installed = {entry.name for entry in fontManager.ttflist}
    east_asian: list[Iterable[str]] = [_CHINESE, _JAPANESE, _KOREAN]
    if _KANA.search(context):
        east_asian = [_JAPANESE, _CHINESE, _KOREAN]
    elif _HANGUL.search(context):
        east_asian = [_KOREAN, _CHINESE, _JAPANESE]
    listed = [family for families in (*east_asian, _OTHER) for family in families]
    others = sorted(family for family in installed if family.startswith(_NOTO))
    return [family for family in dict.fromkeys([*listed, *others]) if family in installed]


@lru_cache
def _add_packages() -> None:
    """Tell matplotlib of the fonts of the extra `cjk`, without importing the packages that bring them."""
    from matplotlib.font_manager import fontManager

    for name in _PACKAGES:
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).iterdir()):
                if path.suffix in (".otf", ".ttc", ".ttf"):
                    fontManager.addfont(path)
    logging.getLogger("matplotlib.font_manager").addFilter(_is_of_other_fonts)


def _is_of_other_fonts(record: logging.LogRecord) -> bool:
    """Return False for the message that a font listed here has no bold style, so that its regular one is used."""
    if not str(record.msg).startswith("findfont: Failed to find font weight"):
        return True
    family = str(record.args[1] if isinstance(record.args, tuple) else "")
    return family not in (*_CHINESE, *_JAPANESE, *_KOREAN, *_OTHER) and not family.startswith(_NOTO)
