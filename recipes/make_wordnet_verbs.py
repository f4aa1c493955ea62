"""Make wordnet_verbs/{train,test}.parquet: definitions of WordNet 3.0's verbs, and what kind of thing the verb does.

    apt-get install wordnet-base
    python recipes/make_wordnet_verbs.py

The ten of WordNet's lexicographer classes with the most definitions; the label is the class. Definitions that occur
twice are left out. WordNet 3.0, copyright 2006 Princeton University; its licence allows this.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

CLASSES = {
    "29": "body",
    "30": "change",
    "31": "cognition",
    "32": "communication",
    "35": "contact",
    "36": "creation",
    "38": "motion",
    "40": "possession",
    "41": "social",
    "42": "stative",
}
NAMES = sorted(CLASSES.values())
TRAIN, TEST = 350, 100  # of each class
WORDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "wordnet_verbs")
    options = parser.parse_args()
    found = definitions(options.wordnet / "data.verb")
    order = np.random.default_rng(2206).permutation(len(found))
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    taken = dict.fromkeys(NAMES, 0)
    for i in order:
        text, name = found[i]
        taken[name] += 1
        if taken[name] <= TEST + TRAIN:
            parts["test" if taken[name] <= TEST else "train"].append((text, name))
    options.output.mkdir(parents=True, exist_ok=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    for part, rows in parts.items():
        columns = {"text": [text for text, _ in rows], "label": [name for _, name in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(options.output / f"{part}.parquet")
        print(part, len(rows), {name: sum(label == name for _, label in rows) for name in NAMES})


def definitions(path: Path) -> list[tuple[str, str]]:
    """Definition and class of every verb that is defined in at least three words, and by no other's definition."""
    rows: dict[str, set[str]] = {}
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith(" "):
            continue
        head, gloss = line.split(" | ", 1)
        text = re.split(r';|"', gloss)[0].strip()
        if len(text.split()) >= WORDS:
            rows.setdefault(text, set()).add(head.split(" ")[1])
    return [
        (text, CLASSES[kinds.pop()])
        for text, kinds in sorted(rows.items())
        if len(kinds) == 1 and kinds <= CLASSES.keys()
    ]


if __name__ == "__main__":
    main()
