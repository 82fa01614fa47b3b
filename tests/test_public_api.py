"""What users may rely on: the names are frozen here, and every one of them is documented."""

import inspect
import subprocess
import sys

import pytest

import hf_xent
from hf_xent import (
    adapt,
    attention,
    caches,
    calibration,
    cem,
    classes,
    continuous,
    dashboard,
    detection,
    laws,
    localization,
    losses,
    ops,
    planning,
    rasch,
    retrieval,
    robust,
    speech,
    teachers,
    trainers,
)
from hf_xent import ranking as auc
from hf_xent.data import selectors
from hf_xent.registry import Registry

TRAINERS = """DistillationConfig DistillationTrainer DXOConfig DXOTrainer EMOConfig EMOTrainer F2CConfig
    F2CTrainer LNRemovalCallback LNRemovalConfig LNRemovalTrainer NoiseFiTConfig NoiseFiTTrainer
    OSPConfig OSPTrainer PatchCallback SPCEConfig SPCETrainer SPO SPOConfig SPOOptions SPOTrainer
    XentConfig XentTrainer"""
PUBLIC = {
    hf_xent: f"""Comparison Head LazyLogits Seam Stats compare detection linear_cross_entropy losses map_logits patch
        seam_of token_logprobs unpatch vocab_loss vocab_stats {TRAINERS}""",
    ops: """DIFFERENTIABLE FORWARD_ONLY STATISTICS Head Payload Shard State Stats dense_stats map_logits merge
        sinkhorn_divergence token_logprobs vocab_loss vocab_stats with_positions""",
    losses: """CompSum CrossEntropy EISL EMO Focal ForwardKL JSD LOSSES Loss MixCE ReverseKL SkewKL TaiLr TotalVariation
        get linear_cross_entropy table""",
    auc: """AP AUCM BCE DualSampler LOSSES Objective PAUCCVaR PAUCDRO RankingLoss TPAUCKL get""",
    teachers: """LocalTeacher OtherVocabularyTeacher PaddedTeacher ServedTeacher SeveralTeachers StoredTeacher
        Teacher load write_cache""",
    classes: """ClassLoss LOSSES OF_STATISTICS OfStatistics get predict resize return_values ssim supervised_contrastive
        table""",
    detection: """BLIND CalibratedScore CountedText SCORES Score TextScorer blind calibrate evaluate frequencies get
        score sweep""",
    calibration: """OBJECTIVES Calibrator Training draw fit report""",
    rasch: """Facet Measure Rasch drop_misfits expected fit probabilities stack variance""",
    selectors: """Compression Length Loss NGrams Random SELECTORS Selector get""",
    laws: """LAWS Allocation AnnealingLaw Curve DownstreamLoss EncoderDecoder Errors Fit Forecast Law LogLaw
        MultiPowerLaw ParametricLoss PowerLaw Split compute_optimal fit get optimal_split read sums table""",
    retrieval: """Grid GridScorer Information Informed RANKINGS WAYS average_precision_at centered infogain informed
        interval minmax mutual_information pmi rank raw recall_at scores zscore""",
    attention: """AttentionBias Harmonic Linear Probabilistic Window alibi_slopes attend attending harmonic_bias
        harmonic_score_mod probabilistic_mask unattend""",
    caches: """StaircaseCache""",
    localization: """Localization Localizer LocalizerConfig Rationale RationaleConfig TextRationale
        background_activation cam draw_landmarks evidence_scores explain faithfulness frozen_call gradient_input
        last_attention localize log_odds mask_area occlusion overlay overlays rationale_html split_rings
        suppression_loss word_tokens""",
    adapt: """EntropyMinimization ImageViews NegativeLabels PromptOptions PromptTuner RMT RePRI SoundViews TFUP TFUPT
        TFUPTConfig TextViews TransductiveTagger class_texts feature_maps features ood_score prototypes
        source_prototypes word_features""",
    speech: """Mixtures PadSpeech STFT apply_mask floored frame_count ideal_binary_mask joined log_mel majority read_wav
        separate si_sdr softened standardized static_mask voice_mask write_wav""",
    dashboard: """Chart Curve Folder Picture Table read render write""",
    continuous: """DigitHead DigitModel DigitModelConfig DigitModelOutput Quantiles""",
    cem: """Categorical CrossEntropyMethod Exponentials Found Integer RareEvent Real SearchOptions Space Trial estimate
        minimize probability search""",
    planning: """GPUS Peak Plan Settings plan""",
    robust: """APGD ATTACKS Attack Attacked Ball Masking PGD PMA PMAPlus ascend attack get masking""",
}
MODULES = (*PUBLIC, trainers)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_names_are_frozen_and_exist(module):
    """What is registered since is public too."""
    registry = getattr(module, "LOSSES", None) or Registry("nothing", {}, "hf_xent")
    assert sorted(module.__all__) == sorted({*PUBLIC[module].split(), *registry.exported})
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_names_of_trainers_are_those_of_their_registry():
    named = [name for names in trainers.METHODS.values() for name in names]
    assert sorted(trainers.__all__) == sorted([*named, "PatchCallback", "stream_distillation"])
    assert set(TRAINERS.split()) <= set(trainers.__all__), "frozen; new ones are in hf_xent.trainers alone"
    for name in trainers.__all__:
        assert getattr(trainers, name).__name__ == name


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module):
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name
            members = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
            own = [(n, f) for n, f in members if f.__module__.startswith("hf_xent") and not n.startswith("_")]
            assert all(inspect.getdoc(f) for _, f in own), (name, [n for n, f in own if not inspect.getdoc(f)])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = hf_xent.nonesuch


def test_import_is_light():
    """Trainers, datasets and TRL are loaded when they are used."""
    heavy = ("transformers", "trl", "datasets", "peft", "triton")
    code = f"import sys, hf_xent; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
