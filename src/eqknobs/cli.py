"""The command `eqknobs`: what is done with results by hand, outside the workflow.

Bad input ends it with status 1 and one line on stderr, wrong usage with status 2. A subcommand is a function that adds
its parser and names what runs it; heavy imports belong into the latter, so that `--help` stays quick.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from eqknobs.errors import one_line_errors


def _add_export_sae(commands: Any) -> None:
    text = "Write a trained SAE as a folder that SAELens loads with SAE.load_from_disk, its normaliser folded in."
    note = "For rms_l1, import eqknobs.sae.saelens_rms before loading."
    parser = commands.add_parser("export-sae", help=text, description=f"{text} {note}")
    parser.add_argument("folder", metavar="FOLDER", help="the SAE: a folder with sae.safetensors and config.json")
    parser.add_argument("out", metavar="OUT", help="folder to write; an earlier export there is replaced")
    parser.add_argument("--model", metavar="NAME", help="model the latents come from, kept as metadata.model_name")
    parser.add_argument("--hook", metavar="NAME", help="place in that model, kept as metadata.hook_name")
    parser.set_defaults(run=_export_sae)


def _export_sae(args: argparse.Namespace) -> None:
    from eqknobs.sae.export import export_saelens

    export_saelens(args.folder, args.out, {"model_name": args.model, "hook_name": args.hook})
    print(f"wrote {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; argv: the arguments without the program's name, by default the process's."""
    parser = argparse.ArgumentParser(prog="eqknobs", description="Find and turn the knobs inside neural audio models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_export_sae,):
        add(commands)
    args = parser.parse_args(argv)
    with one_line_errors():
        args.run(args)


if __name__ == "__main__":
    main()
