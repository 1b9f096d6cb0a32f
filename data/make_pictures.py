"""Draws the pictures of the README and the guides from the demo's runs: `make pictures`. Needs Chromium."""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from cascade_lab import (
    ComparisonDisplay,
    MonitorDisplay,
    OracleLadderDisplay,
    OutcomeFlowDisplay,
    RejectScoreDisplay,
    Run,
    ThresholdDisplay,
)
from cascade_lab.analysis import compare, monitor
from cascade_lab.thresholds import compare_rejectors

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH = 840  # of a picture in a guide, in pixels


def drawn(figure: Figure) -> Image.Image:
    """Return a figure as a picture of about the width of a page."""
    content = io.BytesIO()
    dpi = WIDTH / figure.get_size_inches()[0]
    figure.savefig(content, dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    return Image.open(content)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG."""
    picture.convert("RGB").save(path, optimize=True)
    print(path.name)


def screenshot(page: Path, size: tuple[int, int]) -> Image.Image:
    """Return the first screen of a page, as a browser shows it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        flags += ["--hide-scrollbars", f"--user-data-dir={folder}/profile", f"--screenshot={folder}/page.png"]
        command = [browser, *flags, f"--window-size={size[0]},{size[1]}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        picture = Image.open(f"{folder}/page.png")
        picture.load()
    return picture


def framed(picture: Image.Image) -> Image.Image:
    """Return a picture with a thin grey frame."""
    frame = Image.new("RGB", (picture.width + 2, picture.height + 2), "#c8ccd4")
    frame.paste(picture, (1, 1))
    return frame


def main() -> None:
    """Draw every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the folder with the demo's runs")
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "docs" / "pictures")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    arguments.output.mkdir(parents=True, exist_ok=True)
    demo, dev, tuned = (Run.read(arguments.runs / name) for name in ("demo", "demo-dev", "demo-tuned"))
    displays = {
        "flow": OutcomeFlowDisplay.from_run(demo),
        "oracle_ladder": OracleLadderDisplay.from_run(demo),
        "thresholds": ThresholdDisplay.from_run(dev, stage="gate"),
        "rejectors": RejectScoreDisplay(compare_rejectors(dev)),
        "comparison": ComparisonDisplay(compare(demo, tuned)),
        "monitor": MonitorDisplay(monitor(demo, dev, days=demo.examples.index.to_numpy() % 7)),
    }
    figures = {name: display.plot().figure_ for name, display in displays.items()}
    for name, figure in figures.items():
        save(drawn(figure), arguments.output / f"{name}.png")
    first = screenshot(arguments.runs / "demo" / "report.html", (1280, 800))
    save(framed(first), arguments.output / "report.png")


if __name__ == "__main__":
    main()
