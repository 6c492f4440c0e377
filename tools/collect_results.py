"""Copy a finished run's tables and report figures to docs/results/<run>, and write its summary as README.md:
`python tools/collect_results.py bundled-full`.

The figures are the pages' own drawings, with their light colours written in. With Chromium at hand the overview's head
and its player, where it has one, are pictured too (README.md shows them), with the text between them left out.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking"

INTRODUCTION = """# Results of `config/{run}.yaml`

Written by `tools/collect_results.py {run}` from a finished run; do not edit. The sentences are the report's own, made
from the numbers in [tables/](tables) ([what the columns mean](../../tables.md)). A triangle down is a result against
the method's claim.

{scope}
"""
BUNDLED = """\
What they prove: the chain runs on a real trained codec, and its controls and nulls behave. What they do not
prove: anything about kyutai's Mimi or about natural speech. The speech is synthetic, some voices are derived from one
another, and the codec is small and was trained on part of the voices. With so few test speakers, intervals (95 %,
speakers resampled, then utterances) are likely too narrow for voices in general."""
WHISPER = """\
These are claims about OpenAI's Whisper tiny.en (and base, where it is named) on this data, not about the models of
the paper, nor about its corpora: a few minutes of sound stand for its 2,800 hours. The words are judged by the model
itself. {speech}"""
SCOPES = {
    "audiosae-tiny.en": WHISPER.format(speech="The speech is synthetic."),
    "audiosae-librispeech": WHISPER.format(speech="The speech is LibriSpeech."),
    "accent-bundled": """\
Synthetic accents of one synthesiser (espeak-ng), a small bundled codec and Whisper tiny.en: what
the procedure and its controls do; no claim about the paper's codecs or about people's accents.""",
}
MARKS = {"positive": "▲ supports", "negative": "▼ against", "undecided": "◆ not shown", "measured": "● measured"}


def findings(summary: dict) -> str:
    """The headlines of every target as Markdown lists, by topic."""
    lines = []
    for target, facts in summary["targets"].items():
        lines.append(f"\n## {target}\n")
        topic = None
        for headline in facts["headlines"]:
            if headline["topic"] != topic:
                topic = headline["topic"]
                lines.append(f"\n### {topic}\n")
            lines.append(f"- {MARKS[headline['verdict']]}: {headline['text']} ({headline['detail']})")
    return "\n".join(lines) + "\n"


def main(run: str) -> None:
    source, out = ROOT / "results" / run, ROOT / "docs/results" / run
    page = (source / "report/index.html").read_text()
    stages = dict.fromkeys(re.findall(r'<a href="(\w+\.html)"', page))  # in the order of the navigation
    pages = "".join((source / "report" / name).read_text() for name in stages)
    shutil.rmtree(out / "tables", ignore_errors=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    shutil.copytree(source / "tables", out / "tables")
    (out / "figures").mkdir(parents=True)
    root = re.search(r":root\s*\{(.*?)\}", page, re.S)
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", root[1] if root else ""))
    for number, match in enumerate(re.finditer(r'<svg role="img" aria-label="([^"]*)".*?</svg>', pages, re.S), 1):
        drawing = re.sub(r"var\((--[\w-]+)\)", lambda m: colours[m[1]], match[0])
        drawing = drawing.replace("<svg ", f'<svg style="background:{colours["--card"]}" ', 1)
        name = re.sub(r"[^a-z0-9]+", "-", match[1].lower()).strip("-")[:60]
        (out / "figures" / f"{number:02d}-{name}.svg").write_text(drawing)
    pictures = [f"![{p.stem[3:].replace('-', ' ')}](figures/{p.name})" for p in sorted((out / "figures").iterdir())]
    summary = json.loads((out / "tables/summary.json").read_text())
    text = (
        INTRODUCTION.format(run=run, scope=SCOPES.get(run, BUNDLED))
        + findings(summary)
        + "\n## Figures\n\n"
        + "\n".join(pictures)
        + "\n"
    )
    (out / "README.md").write_text(text)
    if shutil.which("chromium") and 'class="player' in page:
        with tempfile.TemporaryDirectory() as profile:
            shortened = Path(profile) / "page.html"
            shortened.write_text(
                page.replace("</head>", "<style>#findings, #pages, #proof {display: none}</style></head>", 1)
            )
            size = ["--window-size=1180,1130", f"--user-data-dir={profile}", f"--screenshot={out / 'report.png'}"]
            subprocess.run(["chromium", *CHROMIUM.split(), *size, shortened.as_uri()], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
