"""Which features belong to a domain (speech, music, other sounds): AudioSAE's rule, and what it is to be held against.

A feature fires on the share f of a domain's frames (or, by clips, of its clips with a frame on which it fires). In any
set of two domains or more it is labelled with the domain whose f exceeds every other's in the set by at least τ; its
labels are those of all sets together (arXiv 2602.05027, section 3.3.2 and appendix C). All of it is computed from one
matrix, clips × features, of the frames on which a feature fires.

A share f is the mean over a domain's sources, so that a long source does not stand for the domain. Against it: domains
permuted over whole sources (what any difference between sources yields) and over clips; labels that stay when any one
source is left out; a bootstrap over sources and clips.
"""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from tqdm import tqdm

from eqknobs.corpus.cache import ActivationCache
from eqknobs.errors import EqknobsError
from eqknobs.evidence.stats import bootstrap_weights
from eqknobs.io import read_csv, write_csv, write_json
from eqknobs.sae import SAE
from eqknobs.sae.firing import codes

PERPLEXITY = 30
SILHOUETTES = 20  # shuffles of the labels beside the map


class DomainsCfg(TypedDict):
    """What the stage is told of the configuration (`settings.yaml`)."""

    splits: list[str]
    sources: str
    selection: str
    frame_taus: list[float]
    clip_taus: list[float]
    permutations: int
    resamples: int
    map_features: int
    seed: int
    content: NotRequired[dict[str, str]]


def firing_counts(codes_of_frames: csr_matrix, frames: np.ndarray) -> np.ndarray:
    """Frames of each clip on which a feature fires, float64 [clips, m]; frames: how many each clip has, [clips]."""
    clip_of = np.repeat(np.arange(len(frames)), frames)
    member = csr_matrix((np.ones(len(clip_of)), (clip_of, np.arange(len(clip_of)))), (len(frames), len(clip_of)))
    fires = csr_matrix(codes_of_frames > 0, dtype=np.float64)
    return np.asarray((member @ fires).todense())


def shares(
    counts: np.ndarray, frames: np.ndarray, of: np.ndarray, source: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """f of every domain, by frames and by clips, each [domains, m]: means over the domain's sources.

    counts [clips, m], frames [clips]; of: index of each clip's domain; source: of its source; weights: how often each
    clip counts. A source without a clip (in a bootstrap draw) does not count; a domain without one has f = NaN.
    """
    weight = np.ones(len(frames)) if weights is None else weights
    sources = np.unique(source)
    member = (source[None] == sources[:, None]) * weight  # [sources, clips]
    home = np.array([of[source == one][0] for one in sources])
    with np.errstate(invalid="ignore", divide="ignore"):
        by_frame = (member @ counts) / (member @ frames)[:, None]
        by_clip = (member @ (counts > 0)) / member.sum(1)[:, None]
    present = member.sum(1) > 0
    found = []
    for values in (by_frame, by_clip):
        rows = []
        for domain in range(of.max() + 1):
            own = values[present & (home == domain)]
            rows.append(own.mean(0) if len(own) else np.full(counts.shape[1], np.nan))
        found.append(np.array(rows))
    return found[0], found[1]


def labelled(f: np.ndarray, tau: float) -> np.ndarray:
    """Whether a feature has a domain's label, bool [domains, m], from its shares f [domains, m].

    The union over all sets of domains: a label that any set gives, the set of two with the domain where the feature
    fires least gives too.
    """
    others = np.array([np.delete(f, domain, axis=0).min(0) for domain in range(len(f))])
    return f - others >= tau


def _members(f: tuple[np.ndarray, np.ndarray], levels: list[tuple[str, float]]) -> np.ndarray:
    """Labels at every (level, τ), bool [levels, domains, m]."""
    return np.array([labelled(f[level == "clip"], tau) for level, tau in levels])


def permuted_domains(of: np.ndarray, source: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Domains of clips after whole sources changed theirs; each domain keeps its number of sources."""
    sources, index = np.unique(source, return_inverse=True)
    home = np.array([of[source == one][0] for one in sources])
    return rng.permutation(home)[index]


def _map(w_enc: np.ndarray, members: np.ndarray, most: int, seed: int) -> dict[str, Any] | None:
    """t-SNE of the encoder's rows of labelled features, and the silhouette of those with one label.

    members: labels bool [domains, m]. Cosine distances. None if there are too few features.
    """
    rng = np.random.default_rng([seed, 23])
    found = np.flatnonzero(members.any(0))
    found = np.sort(rng.permutation(found)[:most])
    if len(found) <= 3 * PERPLEXITY:
        return None
    rows = w_enc[found] / np.linalg.norm(w_enc[found], axis=1, keepdims=True)
    places = TSNE(perplexity=PERPLEXITY, init="pca", metric="cosine", random_state=seed).fit_transform(rows)
    one = members[:, found].sum(0) == 1
    label = members[:, found].argmax(0)
    drawn = {
        "features": found.tolist(),
        "x": [[round(float(v), 3) for v in point] for point in places],
        "labels": [np.flatnonzero(members[:, j]).tolist() for j in found],
        "silhouette": None,
        "silhouette_shuffled": [],
    }
    if one.sum() > 10 and len(np.unique(label[one])) > 1:
        score = [label[one], *(rng.permutation(label[one]) for _ in range(SILHOUETTES))]
        values = [float(silhouette_score(rows[one], labels, metric="cosine")) for labels in score]
        drawn |= {"silhouette": values[0], "silhouette_shuffled": values[1:]}
    return drawn


def find_domains(
    counts: np.ndarray, clips: pd.DataFrame, names: list[str], cfg: DomainsCfg
) -> tuple[pd.DataFrame, list[dict[str, Any]], np.ndarray]:
    """Labels of all features of an SAE.

    counts: frames on which a feature fires, [clips, m]; clips: frames, domain, source; names: the domains.
    Returns one row a (feature, domain): f by frames and by clips and, column by column, whether it has the label at
    each (level, τ); for each (level, τ, domain) the shares of features with the label in each permutation over sources
    and over clips and in each bootstrap draw, and the share that keeps the label whichever source is left out;
    and the labels at the smallest τ of frames, bool [domains, m].
    """
    frames = clips["frames"].to_numpy(float)
    of = clips["domain"].map({name: i for i, name in enumerate(names)}).to_numpy()
    source = (clips["domain"] + "/" + clips["source"]).to_numpy()
    levels = [("frame", tau) for tau in cfg["frame_taus"]] + [("clip", tau) for tau in cfg["clip_taus"]]
    f = shares(counts, frames, of, source)
    members = _members(f, levels)
    rng = np.random.default_rng([cfg["seed"], 19])

    def null(domains: np.ndarray, sources: np.ndarray) -> np.ndarray:
        return _members(shares(counts, frames, domains, sources), levels).mean(2)

    over_sources = [null(permuted_domains(of, source, rng), source) for _ in range(cfg["permutations"])]
    over_clips = []
    for _ in tqdm(range(cfg["permutations"]), desc="permutations of clips", unit="draw"):
        order = rng.permutation(len(of))  # whole clips go to another domain, with that clip's source
        over_clips.append(null(of[order], source[order]))
    draws = np.zeros((cfg["resamples"], len(of)))
    for domain in range(len(names)):
        own = of == domain
        draws[:, own] = bootstrap_weights(source[own].tolist(), cfg["resamples"], cfg["seed"] + domain)
    drawn = [_members(shares(counts, frames, of, source, weight), levels).mean(2) for weight in draws]
    stays = np.ones_like(members)
    for one in np.unique(source):
        if len(np.unique(source[of == of[source == one][0]])) > 1:  # else the domain would be gone
            stays &= _members(shares(counts, frames, of, source, (source != one).astype(float)), levels)
    found = []
    for place, (level, tau) in enumerate(levels):
        for domain, name in enumerate(names):
            has = members[place, domain]
            record = {"level": level, "tau": tau, "domain": name}
            record |= {"left_out": float((has & stays[place, domain]).sum() / has.sum()) if has.any() else None}
            for key, values in (("permuted", over_sources), ("permuted_clips", over_clips), ("draws", drawn)):
                record[key] = [round(float(value[place, domain]), 6) for value in values]
            found.append(record)
    rows = []
    for domain, name in enumerate(names):
        table = {"feature": np.arange(counts.shape[1]), "domain": name}
        table |= {"frame_share": f[0][domain].round(6), "clip_share": f[1][domain].round(6)}
        table |= {f"{level}_{tau:g}": members[place, domain] for place, (level, tau) in enumerate(levels)}
        rows.append(pd.DataFrame(table))
    return pd.concat(rows, ignore_index=True), found, members[int(np.argmin(cfg["frame_taus"]))]


def score_domains(
    manifest_csv: str | Path,
    cache_h5: str | Path,
    sae_dirs: dict[str, Path],
    out_csv: str | Path,
    out_json: str | Path,
    cfg: DomainsCfg,
) -> None:
    """Tell the features of a target's SAEs apart by domain.

    manifest_csv: of a union of corpora, with `domain`. out_csv: sae, feature, domain, frame_share, clip_share and a
    column a (level, τ), one row a (SAE, feature, domain). out_json: domains, counts of clips and sources, and by SAE
    what `find_domains` finds besides and the map. Raises EqknobsError if there are fewer than two domains.
    """
    manifest = read_csv(manifest_csv).set_index("id")
    tables, found = [], {}
    clips: pd.DataFrame | None = None
    names: list[str] = []
    with ActivationCache(cache_h5) as cache:
        for name, folder in sorted(sae_dirs.items()):
            sae = SAE.load(folder)
            k = getattr(sae.config, "k", 0) if cfg["selection"] == "clip" else 0
            code, listed = codes(cache, sae, cfg["splits"], k)
            about = manifest.loc[listed["id"]]
            source = about[cfg["sources"]].fillna("").where(lambda s: s != "", about["speaker"])
            clips = listed.assign(domain=about["domain"].to_numpy(), source=source.to_numpy())
            names = sorted(clips["domain"].unique())
            if len(names) < 2:
                raise EqknobsError(f"domains: {manifest_csv} has clips of {names[0]} only; check splits and corpora")
            counts = firing_counts(code, clips["frames"].to_numpy())
            rows, records, members = find_domains(counts, clips, names, cfg)
            tables.append(rows.assign(sae=name))
            drawn = _map(sae.W_enc.numpy(), members, cfg["map_features"], cfg["seed"])
            dead = float((counts.sum(0) == 0).mean())
            found[name] = {"labels": records, "map": drawn, "dead": dead, "d_sae": counts.shape[1]}
    assert clips is not None  # a target of this stage has an SAE
    table = pd.concat(tables, ignore_index=True)
    write_csv(out_csv, table[["sae", *(column for column in table if column != "sae")]])
    sources = {name: int(own["source"].nunique()) for name, own in clips.groupby("domain")}
    about_clips = {name: len(own) for name, own in clips.groupby("domain")}
    listing = {"domains": names, "clips": about_clips, "sources": sources, "splits": cfg["splits"]}
    write_json(out_json, {**listing, "speakers": int(clips["speaker"].nunique()), "saes": found})
