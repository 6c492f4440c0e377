"""What a computation reads of the configuration is typed beside it; here it is held against the schema."""

import pytest

from eqknobs.corpus.activations import ActivationsCfg
from eqknobs.corpus.labels import LabelsCfg
from eqknobs.corpus.manifest import CorpusCfg
from eqknobs.corpus.synthesis import SynthesisCfg
from eqknobs.evidence.stage import TablesCfg
from eqknobs.models import ModelCfg
from eqknobs.sae.training import GridCfg, SAECfg
from eqknobs.schema import resolved, schema
from eqknobs.sound.judges import JudgesCfg
from eqknobs.stages.accent.coding import SaeCfg
from eqknobs.stages.accent.compute import AccentCfg, ClassifierCfg
from eqknobs.stages.accent.compute import CodecCfg as AccentCodecCfg
from eqknobs.stages.codec.compute import CodecCfg
from eqknobs.stages.codec_training.training import AdversarialCfg, CodecTrainingCfg
from eqknobs.stages.domains.compute import DomainsCfg
from eqknobs.stages.erasing.compute import ErasingCfg, RandomCfg
from eqknobs.stages.features.compute import FeaturesCfg
from eqknobs.stages.hallucination.compute import HallucinationCfg, RivalsCfg
from eqknobs.stages.importance.compute import ImportanceCfg
from eqknobs.stages.importance.maps import MapsCfg
from eqknobs.stages.label_search.compute import LabelSearchCfg
from eqknobs.stages.lm_layers.compute import LmLayersCfg
from eqknobs.stages.lm_layers.dictionaries import DictionariesCfg, LayerSaesCfg
from eqknobs.stages.lm_layers.turns import TurnLabelsCfg, TurnsCfg
from eqknobs.stages.lm_recipe.compute import RecipeCfg, RecipePromptsCfg
from eqknobs.stages.lm_recipe.nets import TrainingCfg
from eqknobs.stages.phones.compute import PhonesCfg
from eqknobs.stages.probes.compute import ProbesCfg
from eqknobs.stages.quantisation.compute import PlansCfg, RendersCfg
from eqknobs.stages.saes.splicing import SplicingCfg
from eqknobs.stages.speech_lm.compute import AnswersCfg, ScoresCfg
from eqknobs.stages.speech_lm_training.training import DropCfg, SpeechLMTrainingCfg
from eqknobs.stages.stability.compute import StabilityCfg
from eqknobs.stages.steering.compute import CalibrationCfg, SteeringRendersCfg

JOB = {"seed", "device", "content"}  # what a job may have besides
PLANNED_SPLICES = {"targets", "saes", "non_speech", "seeds", "reference"}
OPENED = {"model", "site"}
SOUNDING = OPENED | {"shard"}
OPENED_LM = {"models", "corpus", "lead", "frames", "properties", "tokens", "bins", "lags", "sae", "l2", "epochs"}
PLANNED = {"targets", "corpora"}  # which jobs there are
MAPPED = {"sae", "maps", "gradient_clips", "oracle_clips", "segment_seconds", "val_clips"}  # of importance, by now
HEARD = {
    "clips",
    "heard_clips",
    "heard_parts",
    "heard_widths",
    "heard_budgets",
    "heard_random",
}  # packed codecs, on test
MIXED = {"widths", "budgets", "roundings", "group", "symmetric", "rest", "keep", "random_plans"}
MIXED |= {"sensitivity_clips", "segment_seconds"}
# (typed, its sections, keys of these that are not read, keys that are not theirs)
TYPED = [
    (ModelCfg, ["models.*"], set(), {"name", "device"}),
    (CorpusCfg, ["data"], {"phones"}, set()),
    (ActivationsCfg, ["activations"], set(), OPENED | JOB),
    (LabelsCfg, ["labels"], set(), {"phones"}),
    (SAECfg, ["saes.*"], {"grid", "targets", "corpus"}, {"seed"}),
    (GridCfg, ["saes.*"], {"grid", "targets", "corpus"}, {"seed", "grid"}),
    (StabilityCfg, ["stability"], PLANNED | {"saes"}, {"homes", "seed", "content"}),
    (SplicingCfg, ["splicing"], PLANNED_SPLICES, {"model", "site", "reference", "content"}),
    (DomainsCfg, ["domains"], {"targets", "corpus", "saes"}, {"seed", "content"}),
    (PhonesCfg, ["phones"], PLANNED | {"saes"}, {"seed", "content"}),
    (LabelSearchCfg, ["label_search"], PLANNED | {"saes"}, {"seed", "content"}),
    (ErasingCfg, ["erasing"], {"targets", "saes", "tolerance"}, {"seed", "content"}),
    (RandomCfg, ["erasing.random"], set(), set()),
    (AccentCfg, ["accent"], {"corpus", "synthesis", "codecs"}, JOB | {"model", "codec"}),
    (AccentCodecCfg, ["accent.codecs.*"], set(), set()),
    (SaeCfg, ["accent.sae"], set(), set()),
    (ClassifierCfg, ["accent.classifier"], set(), set()),
    (SynthesisCfg, ["accent.synthesis"], set(), {"seed", "content"}),
    (ProbesCfg, ["probes"], PLANNED | {"saes", "properties", "reference"}, JOB | {"property", "parts"}),
    (FeaturesCfg, ["features"], PLANNED | {"saes", "captions"}, JOB),
    (HallucinationCfg, ["hallucination"], {"models", "sae"}, {"model", "reference", "seed", "content"}),
    (RivalsCfg, ["hallucination.rivals"], set(), set()),
    (CodecCfg, ["codec"], PLANNED | {"saes"}, SOUNDING),
    (CalibrationCfg, ["steering"], PLANNED | {"clips", "alphas", "listen", "other_alpha"}, SOUNDING | {"seed"}),
    (SteeringRendersCfg, ["steering"], PLANNED | {"val_clips", "shift", "tolerance", "alpha_max"}, SOUNDING | {"seed"}),
    (MapsCfg, ["importance"], PLANNED | {"clips", "random_sets", "word_removed", "modes"}, SOUNDING | JOB),
    (ImportanceCfg, ["importance"], PLANNED | MAPPED, SOUNDING | JOB),
    (PlansCfg, ["quantisation"], PLANNED | HEARD, SOUNDING | JOB),
    (RendersCfg, ["quantisation"], PLANNED | MIXED, SOUNDING | JOB),
    (JudgesCfg, ["judges"], {"answer_window"}, {"device", "window"}),
    (AnswersCfg, ["speech_lm", "judges"], {"models", "answer_window"}, {"model"}),
    (LmLayersCfg, ["lm_layers"], OPENED_LM - {"properties", "bins", "lags"}, JOB),
    (DictionariesCfg, ["lm_layers"], OPENED_LM - {"sae", "bins", "l2", "epochs"}, JOB),
    (LayerSaesCfg, ["lm_layers.sae"], set(), set()),
    (TurnLabelsCfg, ["labels", "lm_layers"], OPENED_LM - {"tokens"}, {"phones"}),
    (TurnsCfg, ["lm_layers", "judges"], OPENED_LM - {"lead", "frames"} | {"answer_window"}, JOB | {"model"}),
    (RecipeCfg, ["lm_recipe"], {"models"}, JOB | {"model", "judges", "bootstrap"}),
    (RecipePromptsCfg, ["lm_recipe.prompts"], set(), set()),
    (TrainingCfg, ["lm_recipe.training"], set(), set()),
    (SpeechLMTrainingCfg, ["speech_lm_training"], {"synthesis", "scores"}, JOB),
    (DropCfg, ["speech_lm_training.drop"], set(), set()),
    (ScoresCfg, ["speech_lm_training.scores"], set(), set()),
    (CodecTrainingCfg, ["codec_training"], set(), JOB),
    (AdversarialCfg, ["codec_training.adversarial"], set(), set()),
    (TablesCfg, ["tables"], set(), {"seed", "word_codebooks", "targets", "stages"}),
]


def keys(section: str) -> tuple[set[str], set[str]]:
    """The keys that a section of the configuration may have, and those that it must: of cases any, and all."""
    part = schema()
    for name in section.split("."):
        part = resolved(part["additionalProperties"] if name == "*" else part["properties"][name])
    cases = [resolved(case["then"]) for case in part["allOf"]] if "allOf" in part else [part]
    may, must = ([set(case[kind]) for case in cases] for kind in ("properties", "required"))
    return set.union(*may), set.intersection(*must)


@pytest.mark.parametrize(
    ("typed", "sections", "unread", "ours"), TYPED, ids=lambda value: getattr(value, "__name__", "")
)
def test_typed_configurations_have_the_keys_of_the_schema(typed, sections, unread, ours):
    may, must = (set.union(*found) for found in zip(*map(keys, sections)))
    assert unread <= may
    assert set(typed.__annotations__) - ours == may - unread
    assert typed.__required_keys__ - ours <= must
