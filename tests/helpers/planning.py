"""Snakemake's plans (`--summary`, `-n`) from a process that imported it already: `python planning.py` reads requests
from its standard input and answers each from a fork of its own, in which nothing of ours is imported yet.

A plan costs half of what it costs in a process of its own, and the tests ask for more than a hundred.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HEAVY = ["snakemake.cli", "snakemake.dag", "snakemake.parser", "snakemake.workflow", "pandas", "jsonschema"]


def serve() -> None:
    """Answer requests, one a line, until there are no more."""
    for name in HEAVY:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            plan(request)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(code), flush=True)


def plan(request: dict) -> None:
    """Be a Snakemake of its own, and end."""
    from snakemake.cli import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    sys.path.insert(0, request["env"]["PYTHONPATH"])
    sys.argv = ["snakemake", *request["arguments"]]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@cache
def _server() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def planned(folder: Path, arguments: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess:
    """As `subprocess.run` of Snakemake in a folder, for arguments that run no job."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as kept:
        files = {name: f"{kept}/{name}" for name in ("stdout", "stderr")}
        request = {"folder": str(folder), "arguments": arguments, "env": env} | files
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        said = {name: Path(file).read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(["snakemake", *arguments], code, **said)


if __name__ == "__main__":
    serve()
