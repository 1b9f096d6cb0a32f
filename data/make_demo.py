"""Make the demo's eval sets from its hand-written phrasings: `python data/make_demo.py`.

Every message in `phrasings/` was written for this project: 64 for each of 40 intents of a company's service
desk, and 1,200 that the desk cannot answer. A phrasing belongs to exactly one of train, dev and test, so that no tested
phrasing was trained on. Then its slots, such as {person}, are filled. The same seed gives the same files.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

FOLDER = Path(__file__).parent
SEED = 20261123
SHARES = {"train": 0.68, "dev": 0.10, "test": 0.22}
FILLED = {"train": 3, "dev": 1, "test": 2}  # how often a phrasing with slots is filled
FILLERS = {
    "app": "Excel, Word, Outlook, Photoshop, Jira, AutoCAD, SAP, Visio, Acrobat, Power BI, Slack, Teams, Figma",
    "country": "France, Spain, Japan, Canada, Brazil, Norway, India, Turkey, Mexico, Switzerland",
    "day": "monday, tuesday, wednesday, thursday, friday, tomorrow, next week",
    "device": "laptop, tablet, work phone, notebook, computer",
    "drive": "finance, marketing, projects, legal, archive, engineering, sales",
    "floor": "1, 2, 3, 4, 5, ground",
    "number": "2, 3, 4, 5, 6, 8",
    "person": "Anna, Tom Becker, Priya, Mr Novak, Luis, Mei Chen, Sarah Okafor, Jonas, Fatima, David Klein, Ms Rossi",
    "printer": "Falcon, Osprey, Heron, the colour printer, PR-204, PR-117",
    "room": "Oslo, Lisbon, Kyoto, B12, the blue room, 3.14, the boardroom",
    "site": "Leeds, Hamburg, Porto, Boston, the warehouse, the main office, the plant",
    "team": "sales, legal, finance, marketing, HR, logistics, design, support",
    "time": "9am, 10:30, 2 pm, half past three, 16:00, noon",
}


def split_of(n: int, rng: np.random.Generator) -> list[str]:
    """Return a split for each of `n` phrasings of a label, in shares that every label keeps."""
    ends = (np.cumsum(list(SHARES.values())) * n).round().astype(int)
    ordered = np.repeat(list(SHARES), np.diff([0, *ends]))
    return rng.permutation(ordered).tolist()


def filled(phrasing: str, rng: np.random.Generator) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(FILLERS[slot[1]].split(", ")), phrasing)


def main() -> None:
    rng = np.random.default_rng(SEED)
    rows = []
    for path in sorted((FOLDER / "phrasings").glob("*.txt")):
        label = "oos" if path.stem.startswith("oos") else path.stem
        phrasings = path.read_text(encoding="utf-8").splitlines()
        for i, (phrasing, split) in enumerate(zip(phrasings, split_of(len(phrasings), rng), strict=True)):
            times = FILLED[split] if "{" in phrasing else 1
            for text in dict.fromkeys(filled(phrasing, rng) for _ in range(times)):
                scope = "oos" if label == "oos" else "in"
                rows.append((text, label, scope, f"{path.stem}-{i}", split))
    frame = pd.DataFrame(rows, columns=["text", "label", "scope", "phrasing", "split"]).drop_duplicates("text")
    for split in SHARES:
        part = frame[frame["split"] == split].drop(columns="split")
        ids = [f"{split}-{i}" for i in range(len(part))]
        part.insert(0, "example_id", ids)
        part.to_csv(FOLDER / f"{split}.tsv", sep="\t", index=False, quoting=3)
        print(f"{split}: {len(part)} texts, {part['phrasing'].nunique()} phrasings, {part['label'].nunique()} labels")


if __name__ == "__main__":
    main()
