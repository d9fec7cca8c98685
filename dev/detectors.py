#!/usr/bin/env python3
"""Tries RefBN in each place of each detector of the package, at an eighth of its width.

    dev/detectors.py

Prints the table of docs/detectors.md. For each place it captures the reference, trains two steps,
evaluates, saves a checkpoint, and resumes for a third step. tests/test_detectors.py asserts the
same.
"""

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import detectors  # noqa: E402  (of the tests)
import tiny  # noqa: E402

from refbn_d2.statistics.reference import reference_layers  # noqa: E402


def row(name: str, folder: Path) -> str:
    """Markdown rows of one detector, one for each place of a norm."""
    detector = detectors.DETECTORS[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides the tables that pycocotools prints
            detectors.train(detector, folder, max_iter=2)
            model = detectors.train(detector, folder, max_iter=3, resume=True).model
        held = all(m.has_reference for m in reference_layers(model).values())
        works = "yes" if held else "no: a layer has no reference"
        counts = detectors.count_layers(model, detector)
    except Exception as e:  # any failure becomes a row of the table
        works, counts = f"no: {type(e).__name__}: {e}", dict.fromkeys(detector.places, 0)
    return "\n".join(f"| {name} | `{key}` | {n} | {works} |" for key, n in counts.items())


def main() -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        data = tiny.write(Path(folder))
        tiny.register(data)
        detectors.write_segmentation(data)
        print("| detector | key | layers | works |\n|---|---|---:|---|")
        for n, name in enumerate(detectors.DETECTORS):
            print(row(name, data / f"run{n}"), flush=True)


if __name__ == "__main__":
    main()
