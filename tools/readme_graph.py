"""Put the workflow's current rule graph into README.md: `python tools/readme_graph.py`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    graph = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    readme = ROOT / "README.md"
    block = f"```mermaid\n{graph}\n```"
    text, found = re.subn(r"```mermaid\n.*?```", lambda _: block, readme.read_text(), flags=re.S)
    if found != 1:
        sys.exit(f"error: README.md has {found} mermaid blocks, one is wanted")
    readme.write_text(text)
