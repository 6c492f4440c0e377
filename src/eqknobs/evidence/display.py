"""Tables as the page shows them: cells as text, with their intervals."""

from typing import Any

import pandas as pd


def cell(row: dict[str, Any], name: str, digits: int = 3) -> tuple[str, str]:
    """(value, interval) as text; what the table says instead of a number goes through as it is."""
    value = row.get(name)
    if value is None or pd.isna(value):
        return "–", ""

    def shown(number: Any) -> str:
        return f"{float(number):.{digits}f}".replace("-", "−")

    try:
        text = shown(value)
    except ValueError:  # "unmeasurable"
        return str(value), ""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return text, "" if low is None or pd.isna(low) or pd.isna(high) else f"[{shown(low)}, {shown(high)}]"


def laid_out(table: pd.DataFrame, columns: dict[str, Any]) -> dict[str, Any]:
    """{head, rows} for the template. columns: heading -> column, (column, digits) or a function of the row."""
    body = []
    for row in table.to_dict("records"):
        cells = []
        for column in columns.values():
            if callable(column):
                cells.append((column(row), ""))
            elif isinstance(column, tuple):
                cells.append(cell(row, *column))
            else:
                value = row[column]
                text = "–" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
                cells.append((text, ""))
        body.append(cells)
    return {"head": list(columns), "rows": body}


def sample(row: dict[str, Any]) -> str:
    """Clips and speakers that a row rests on."""
    return f"{row.get('clips', row.get('utterances'))} / {row['speakers']}"


# The columns of judged words and voices, as several sections show them.
WORDED: dict[str, Any] = {
    "WER": ("wer", 3),
    "WER, text": ("wer_text", 3),
    "speaker similarity": ("speaker_similarity", 3),
}
