"""The command `eqknobs`: what is done with results by hand, outside the workflow.

Bad input ends it with status 1 and one line on stderr, wrong usage with status 2. A subcommand is a function that adds
its parser and names what runs it; heavy imports belong into the latter, so that `--help` stays quick.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from eqknobs.errors import EqknobsError, counted, one_line_errors


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


def _add_import_sae(commands: Any) -> None:
    text = "Read an SAE of AudioSAE (ae.pt) and write it as ours; a cache of its layer settles the scale of its input."
    parser = commands.add_parser("import-sae", help=text, description=text)
    parser.add_argument("--ae", required=True, metavar="FILE", help="ae.pt; a config.json beside it is read too")
    parser.add_argument("--cache", required=True, metavar="FILE", help="activations of that layer, activations/*.h5")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; an earlier import is replaced")
    parser.set_defaults(run=_import_sae)


def _import_sae(args: argparse.Namespace) -> None:
    from eqknobs.sae.audiosae_files import import_audiosae

    print("\n".join(import_audiosae(args.ae, args.cache, args.out).lines()))
    print(f"wrote {args.out}")


def _add_vram(commands: Any) -> None:
    text = (
        "Print what the Moshi models of a configuration need on a GPU, computed from shapes; refuse what does not fit."
    )
    parser = commands.add_parser("vram", help=text, description=text)
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration, as for --configfile")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="sound in one piece, prompts included; default: data.max_seconds"
    )
    parser.set_defaults(run=_vram)


def _vram(args: argparse.Namespace) -> None:
    from eqknobs.config import read_config
    from eqknobs.models.moshi.memory import plan, require
    from eqknobs.plan import models_used

    config = read_config(args.config)
    used = {name: config["models"][name] for name in models_used(config)}
    models = [{"name": name, **model} for name, model in used.items() if model["kind"] == "moshi"]
    if not models:
        raise EqknobsError(f"{args.config}: no model of kind moshi in use; other kinds need little memory")
    seconds = config["data"]["max_seconds"] if args.seconds is None else args.seconds
    if not 0 < seconds < float("inf"):
        raise EqknobsError(f"--seconds: must be above 0, got {seconds:g}")
    for model in models:
        print(f"{model['name']} ({model['path']}), {seconds:g} s, computed:")
        print("\n".join(plan(model, seconds).lines()), flush=True)
        require(model, seconds, config["hardware"]["vram_gb"])
        print(f"  fits hardware.vram_gb = {config['hardware']['vram_gb']:g}")


def _add_plan(commands: Any) -> None:
    text = "Print what a run will take, stage by stage: jobs, disk, memory and hours, computed from measurements."
    note = "Nothing is started or downloaded. What a Moshi needs on a card: eqknobs vram."
    parser = commands.add_parser("plan", help=text, description=f"{text} {note}")
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration, as for --configfile")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from eqknobs.config import read_config
    from eqknobs.forecast import plan

    print("\n".join(plan(args.config, read_config(args.config))))


def _add_talk(commands: Any) -> None:
    text = "Let a Moshi model hear a recording: print its monologue as it forms and write its answer."
    note = (
        "The answer is as long as what is heard: both sides speak at once. --seconds gives it time after the recording."
    )
    parser = commands.add_parser("talk", help=text, description=f"{text} {note}")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_HUB_ID", help="e.g. kyutai/moshiko-pytorch-bf16")
    parser.add_argument("--audio", required=True, metavar="FILE", help="the user: any sound file, resampled if need be")
    parser.add_argument("--out", required=True, metavar="FILE", help="the answer, .wav or .flac")
    parser.add_argument("--text-prompt", metavar="TEXT", help="who the agent is (PersonaPlex)")
    parser.add_argument("--voice", metavar="FILE", help="the agent's voice (PersonaPlex): a .pt voice or a recording")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length of the conversation; default: the recording's"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, default 0")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="of sound and text; default: .8 for sound, .7 for text"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--nf4", action="store_true", help="pack the temporal transformer in 4 bits")
    parser.add_argument(
        "--codec", metavar="FOLDER_OR_HUB_ID", help="default: what the model's config.json names, or kyutai/mimi"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    parser.set_defaults(run=_talk)


def _talk(args: argparse.Namespace) -> None:
    from eqknobs.models import ModelCfg
    from eqknobs.models.moshi.generate import GREEDY, Sampling
    from eqknobs.talk import talk

    if not 0 <= args.seed < 2**63:
        raise EqknobsError(f"--seed: must be 0 or above and below 2^63, got {args.seed}")
    sampling = GREEDY if args.greedy else Sampling(seed=args.seed)
    if args.temperature is not None:
        if args.greedy:
            raise EqknobsError("--greedy takes the likeliest token; leave out --temperature")
        if not 0 < args.temperature < float("inf"):
            raise EqknobsError(f"--temperature: must be above 0, got {args.temperature:g}; --greedy is 0")
        sampling = Sampling(temperature=args.temperature, text_temperature=args.temperature, seed=args.seed)
    model: ModelCfg = {"name": "model", "kind": "moshi", "path": args.model, "revision": None, "device": args.device}
    model |= {"codec": args.codec, "nf4": args.nf4}
    talk(model, args.audio, args.out, args.text_prompt, args.voice, args.seconds, sampling)
    print(f"wrote {args.out}")


def _add_convert_whisper(commands: Any) -> None:
    text = "Turn a Whisper of CTranslate2's format (faster-whisper's) into a folder that transformers loads."
    parser = commands.add_parser("convert-whisper", help=text, description=text)
    parser.add_argument(
        "folder", metavar="FOLDER", help="with config.json, tokenizer.json and, without --parts, model.bin"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; an earlier one there is replaced")
    parser.add_argument(
        "--parts", nargs="+", metavar="FILE", help="the weights, where they are cut in pieces, in order"
    )
    parser.set_defaults(run=_convert_whisper)


def _convert_whisper(args: argparse.Namespace) -> None:
    from eqknobs.models.ctranslate2 import convert_whisper

    convert_whisper(args.parts or [f"{args.folder}/model.bin"], args.folder, args.out)
    print(f"wrote {args.out}")


def _add_clean(commands: Any) -> None:
    text = "Remove kept pieces of work (transcripts, voices) that no run used lately; results stay as they are."
    parser = commands.add_parser("clean", help=text, description=text)
    parser.add_argument("--days", type=float, default=30, metavar="D", help="not used for D days, default 30; 0: all")
    parser.set_defaults(run=_clean)


def _clean(args: argparse.Namespace) -> None:
    from eqknobs.pieces import STORE, prune

    if not 0 <= args.days < float("inf"):
        raise EqknobsError(f"--days: must be 0 or more, got {args.days:g}")
    count, size = prune(STORE, args.days)
    print(f"removed {counted(count, 'piece')} of {STORE} ({size / 1e6:.1f} MB)")


def _add_compress(commands: Any) -> None:
    text = "Write a model smaller: weights as packed integers of 2 to 8 bits, with a scale a channel or group."
    note = "The folder loads as the model did, by its path. docs/packing.md describes plans and files."
    parser = commands.add_parser("compress", help=text, description=f"{text} {note}")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a folder, a hub id (kyutai/mimi) or a bundled model's name"
    )
    parser.add_argument("--plan", required=True, metavar="PLAN", help="a plan's JSON file, or uniform:BITS (2 to 8)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; must be new or empty")
    parser.add_argument(
        "--kind",
        metavar="KIND",
        help="mimi, encodec, dac, hubert, whisper or moshi; default: what its config.json says",
    )
    parser.add_argument("--revision", metavar="COMMIT", help="of a hub model")
    uniform = parser.add_argument_group("of uniform plans")
    uniform.add_argument("--group", type=int, metavar="N", help="inputs that share a scale; default: a whole channel")
    uniform.add_argument(
        "--rounding", choices=["nearest", "mse"], help="mse clips each group for the least error; default: nearest"
    )
    uniform.add_argument("--zero-points", action="store_true", help="asymmetric: a zero point a group beside the scale")
    uniform.add_argument(
        "--rest", choices=["float16", "float32"], help="type of tensors that are not packed; default: float16"
    )
    uniform.add_argument(
        "--keep", action="append", choices=["embeddings", "codebooks"], help="leave these unpacked; may be repeated"
    )
    parser.set_defaults(run=_compress)


def _compress(args: argparse.Namespace) -> None:
    from eqknobs.compress import compress

    given = {"group": args.group, "rounding": args.rounding, "rest": args.rest}
    options = {key: value for key, value in given.items() if value is not None}
    if args.zero_points:
        options["symmetric"] = False
    print(compress(args.model, args.plan, args.out, args.kind, args.keep or (), args.revision, **options))
    print(f"wrote {args.out}")


def _add_unpack(commands: Any) -> None:
    text = "Write a packed model with float32 weights again, as its own library (transformers) loads it."
    parser = commands.add_parser("unpack", help=text, description=text)
    parser.add_argument("folder", metavar="FOLDER", help="a folder that eqknobs compress wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; must be new or empty")
    parser.set_defaults(run=_unpack)


def _unpack(args: argparse.Namespace) -> None:
    from eqknobs.compress import unpack

    print(unpack(args.folder, args.out))
    print(f"wrote {args.out}")


def _add_explore(commands: Any) -> None:
    text = "Page the features of a run's SAE that are strongest in a recording of yours."
    note = "Beside each stand the run's own strongest moments of it, where the stage features paged it."
    parser = commands.add_parser("explore", help=text, description=f"{text} {note}")
    parser.add_argument("--run", required=True, metavar="FOLDER", dest="folder", help="a finished run: results/<run>")
    parser.add_argument("--target", required=True, metavar="TARGET", help="e.g. tiny-mimi.encoder_transformer")
    parser.add_argument("--sae", required=True, metavar="SAE", help="a key under saes of that run's configuration")
    parser.add_argument("--audio", required=True, metavar="FILE", help="any sound file of up to five minutes")
    parser.add_argument("--out", default="explored", metavar="FOLDER", help="where index.html goes, default: explored")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="features to show, default 12")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    parser.set_defaults(run=_explore)


def _explore(args: argparse.Namespace) -> None:
    from eqknobs.explore import explore

    if not 1 <= args.count <= 200:
        raise EqknobsError(f"--count: must be 1 to 200, got {args.count}")
    page = explore(args.folder, args.target, args.sae, args.audio, args.out, args.count, args.device)
    print(f"wrote {page}")


def _add_transcribe(commands: Any) -> None:
    text = "Transcribe a recording with a Whisper of a run, before and after what keeps it silent where nobody speaks."
    note = "--steer names an arm of the stage hallucination, which is applied as that chose it."
    parser = commands.add_parser("transcribe", help=text, description=f"{text} {note}")
    parser.add_argument("--run", required=True, metavar="FOLDER", dest="folder", help="a finished run: results/<run>")
    parser.add_argument("--model", required=True, metavar="NAME", help="under hallucination.models of that run")
    parser.add_argument("--audio", required=True, metavar="FILE", help="any sound file, resampled if need be")
    parser.add_argument(
        "--steer", default="none", metavar="ARM", help="e.g. sae, sae_scaled, mean_difference, vad; default: none"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    parser.set_defaults(run=_transcribe)


def _transcribe(args: argparse.Namespace) -> None:
    from eqknobs.transcribe import transcribe

    for window in transcribe(args.folder, args.model, args.audio, args.steer, args.device):
        minutes, seconds = divmod(int(window.start), 60)
        print(f"{minutes}:{seconds:02d} (no speech: {window.no_speech_prob:.2f}) {window.before or '(nothing)'}")
        if args.steer != "none":
            print(f"    {args.steer}: {window.after or '(nothing)'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; argv: the arguments without the program's name, by default the process's."""
    parser = argparse.ArgumentParser(prog="eqknobs", description="Find and turn the knobs inside neural audio models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    saes = (_add_export_sae, _add_import_sae, _add_explore)
    models = (_add_vram, _add_plan, _add_talk, _add_transcribe, _add_compress, _add_unpack, _add_convert_whisper)
    for add in (*saes, *models, _add_clean):
        add(commands)
    args = parser.parse_args(argv)
    with one_line_errors():
        args.run(args)


if __name__ == "__main__":
    main()
