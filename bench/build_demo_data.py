"""Cut the demo's data set from the full one: ``python -m bench.build_demo_data FULL.npz``.

The full set holds 117,659 WordNet 3.0 glosses ("lemma: definition") embedded with all-MiniLM-L6-v2 and
quantised to int8 with one scale, in random order, so that its first rows are a uniform random sample:
categories keep their proportions.  The demo keeps `ROWS` rows and `QUERIES` queries of each family, about as
many as fit into 12 MB.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bench.dataset import DEMO_FILE, FAMILIES

ROWS = 30_000
QUERIES = 2_000


def cut(full: Path, target: Path = DEMO_FILE, rows: int = ROWS, queries: int = QUERIES) -> None:
    """Write the first `rows` rows and `queries` queries of each family of `full` to `target`."""
    with np.load(full) as source:
        arrays = {
            "base": source["base"][:rows],
            "category": source["category"][:rows],
            "scale": source["scale"],
        }
        for family in FAMILIES:
            arrays[f"q_{family}"] = source[f"q_{family}"][:queries]
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cut(Path(sys.argv[1]))
    print(f"{DEMO_FILE}: {DEMO_FILE.stat().st_size / 1e6:.1f} MB")
