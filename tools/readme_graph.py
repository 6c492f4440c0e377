"""Put the workflow's current rule graph into README.md: `python tools/readme_graph.py`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_order(graph: str) -> str:
    """A mermaid graph of Snakemake's with its nodes and edges in one order; Snakemake's own changes from call to call.

    Rules come after what they need, alphabetically where that leaves a choice.
    """
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", graph))
    styles = {names[node]: style for node, style in re.findall(r"style (id\d+) (.+)", graph)}
    edges = {(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", graph)}
    order: list[str] = []
    while left := sorted(set(names.values()) - set(order)):
        order.append(next(rule for rule in left if all(a in order for a, b in edges if b == rule != a)))
    number = {rule: f"id{i}" for i, rule in enumerate(order)}
    lines = [f"{number[rule]}[{rule}]" for rule in order]
    lines += [f"style {number[rule]} {styles[rule]}" for rule in order]
    lines += [f"{number[a]} --> {number[b]}" for a in order for b in order if (a, b) in edges]
    head = graph[: graph.index("flowchart")] + graph[graph.index("flowchart") :].splitlines()[0]
    return "\n\t".join([head, *lines])


if __name__ == "__main__":
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    graph = in_order(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())
    readme = ROOT / "README.md"
    block = f"```mermaid\n{graph}\n```"
    text, found = re.subn(r"```mermaid\n.*?```", lambda _: block, readme.read_text(), flags=re.S)
    if found != 1:
        sys.exit(f"error: README.md has {found} mermaid blocks, one is wanted")
    readme.write_text(text)
