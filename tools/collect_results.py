"""Copy a finished run's tables and report figures to docs/results: `python tools/collect_results.py bundled-full`.

The figures are the page's own drawings, with its light colours written in. With Chromium at hand the top of the page
is pictured too (README.md shows it).
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking"


def main(run: str) -> None:
    source, out = ROOT / "results" / run, ROOT / "docs/results"
    page = (source / "report/index.html").read_text()
    shutil.rmtree(out / "tables", ignore_errors=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    shutil.copytree(source / "tables", out / "tables")
    (out / "figures").mkdir(parents=True)
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", re.search(r":root\s*\{(.*?)\}", page, re.S).group(1)))
    for number, match in enumerate(re.finditer(r'<svg role="img" aria-label="([^"]*)".*?</svg>', page, re.S), 1):
        drawing = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m[1]], match[0])
        drawing = drawing.replace("<svg ", f'<svg style="background:{colours["--card"]}" ', 1)
        name = re.sub(r"[^a-z0-9]+", "-", match[1].lower()).strip("-")[:60]
        (out / "figures" / f"{number:02d}-{name}.svg").write_text(drawing)
    if shutil.which("chromium"):
        with tempfile.TemporaryDirectory() as profile:
            size = ["--window-size=1180,1500", f"--user-data-dir={profile}", f"--screenshot={out / 'report.png'}"]
            subprocess.run(["chromium", *CHROMIUM.split(), *size, (source / "report/index.html").as_uri()], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
