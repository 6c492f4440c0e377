"""Put the table of the configuration's keys into config/README.md: `python tools/config_table.py`; `--check` compares.

The descriptions stand in the `settings.yaml` files, with what they configure.
"""

import sys
from pathlib import Path

from eqknobs.schema import described

README = Path(__file__).resolve().parents[1] / "config/README.md"
BEGIN, END = "<!-- made by tools/config_table.py -->", "<!-- end -->"


def filled(text: str) -> str:
    """The text of config/README.md with the current table between its two markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "".join(f"| `{key}` | {meaning} |\n" for key, meaning in described())
    return f"{before}{BEGIN}\n\n| key | meaning |\n|---|---|\n{rows}\n{END}{after}"


if __name__ == "__main__":
    wanted = filled(README.read_text())
    if "--check" in sys.argv:
        sys.exit("config/README.md is stale; run python tools/config_table.py" if wanted != README.read_text() else 0)
    README.write_text(wanted)
