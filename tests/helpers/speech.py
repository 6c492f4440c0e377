"""Clips of the bundled corpus with what is said in them."""

import pandas as pd
import pytest

from eqknobs.io import file_sha256, read_csv
from helpers import ROOT

CORPUS = ROOT / "resources/corpus"


def labelled_clips() -> pd.DataFrame:
    """Two clips of each of four voices: id, path, speaker, split, text, sha256. Without the corpus the test is
    skipped."""
    if not (CORPUS / "labels.csv").is_file():
        pytest.skip("the bundled corpus is not here")
    labels = read_csv(CORPUS / "labels.csv")
    apart = labels[labels["derived_from"].isna()]["speaker"].drop_duplicates().iloc[[0, 1, 2, 3]]
    rows = []
    for speaker in apart:
        for file in sorted((CORPUS / speaker).rglob("*.flac"))[:2]:
            lines = (file.parent / f"{'-'.join(file.stem.split('-')[:2])}.trans.txt").read_text().splitlines()
            text = dict(line.split(" ", 1) for line in lines)[file.stem]
            rows.append((file.stem, str(file), speaker, "test", text, file_sha256(file)))
    return pd.DataFrame(rows, columns=["id", "path", "speaker", "split", "text", "sha256"])
