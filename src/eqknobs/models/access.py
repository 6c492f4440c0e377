"""Whether the hub serves the models of a run to this user, asked before gigabytes of speech are fetched for them."""

from pathlib import Path
from typing import Any

from eqknobs.errors import EqknobsError
from eqknobs.models.packaged import packaged


def gated(name: str, path: str) -> EqknobsError:
    """The error for a hub model whose licence the user has not accepted. name: its key under models."""
    return EqknobsError(
        f"models.{name}: the weights of {path} are gated: accept the licence at https://huggingface.co/{path} "
        "and log in with `hf auth login` (or set HF_TOKEN); kyutai/moshiko-pytorch-bf16 is open"
    )


def require_access(config: dict[str, Any]) -> None:
    """Ask the hub for the models of the run's targets and their codecs, a few hundred bytes each.

    Models in folders, those that come in packages, and models that were fetched before ask nothing. Raises
    EqknobsError, one line: a gated or unknown model or revision, no such folder, no answer from the hub.
    """
    for name in sorted({target.partition(".")[0] for target in config["run"]["targets"]}):
        model = config["models"][name]
        wanted = [("path", model["path"], model.get("revision"))]
        if model["kind"] == "moshi":
            wanted.append(("codec", model.get("codec") or "kyutai/mimi", model.get("codec_revision")))
        for key, path, revision in wanted:
            if not Path(path).is_dir() and not packaged(path):
                _ask(name, key, path, revision)


def _ask(name: str, key: str, path: str, revision: str | None) -> None:
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise EqknobsError(f"models.{name}.{key}: no folder {path}; give a model folder or a hub id such as owner/name")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    if try_to_load_from_cache(path, "config.json", revision=revision) is not None:
        return  # the file, or the hub's word that there is none (early Moshi checkpoints)
    try:
        get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision))
    except GatedRepoError as error:
        raise gated(name, path) from error
    except EntryNotFoundError:  # early Moshi checkpoints have no config.json: the hub let us look
        return
    except Exception as error:  # whatever the network and the hub's client come up with
        reason = next(iter(str(error).strip().splitlines()), "")
        raise EqknobsError(
            f"models.{name}.{key}: cannot get {path!r} (no such folder, so taken as a hub id); check path, revision "
            f"and network ({type(error).__name__}: {reason[:300]})"
        ) from error
