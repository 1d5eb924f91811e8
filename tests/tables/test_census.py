"""The census of Transformers' classes: its judge, its page and what it finds."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
import transformers

from hf_sketch.recipes.tables.census.__main__ import (
    CensusArguments,
    run_census,
    saved_verdicts,
)
from hf_sketch.recipes.tables.census.judge import (
    EXAMPLES,
    Verdict,
    compared,
    judge,
    tiny_model,
)
from hf_sketch.recipes.tables.census.page import page
from hf_sketch.recipes.tables.census.pool import judged
from hf_sketch.recipes.tables.census.tasks import TASKS, Case, cases

# Between them: a class per task, attention of several sorts, experts, a state space,
# convolutions, windows, a decoder with cross-attention, patches of images end to end,
# embeddings that are changed in place or have no gradient for padding.
RIGHT = [
    "BartForConditionalGeneration",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "CTRLLMHeadModel",
    "DebertaV2ForSequenceClassification",
    "GPT2ForQuestionAnswering",
    "Gemma3nForCausalLM",
    "HubertForSequenceClassification",
    "MixtralForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "RobertaForMaskedLM",
    "SwinForImageClassification",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
]
CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", RIGHT)
def test_rows_of_the_class_are_right(name):
    verdict = judge(CASES[name])
    assert (verdict.outcome, verdict.reason) == ("right", "")
    assert verdict.worst is not None
    assert verdict.worst > 0.999
    assert not verdict.mixes


def test_batch_norm_is_refused_for_examples_that_see_each_other():
    verdict = judge(CASES["ResNetForImageClassification"])
    assert (verdict.outcome, verdict.mixes) == ("refused", True)
    assert "BatchNorm" in verdict.reason


def test_a_class_that_does_not_train_alone_does_not_count():
    verdict = judge(CASES["DeiTForImageClassificationWithTeacher"])
    assert verdict.outcome == "not trained"
    assert "did not return a loss" in verdict.reason


def test_every_class_of_the_mappings_is_one_case():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) > 500
    assert {case.task for case in cases()} == set(TASKS)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_no_parameter_of_a_tiny_model_is_constant(name):
    model = tiny_model(CASES[name])
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert all(p.unique().numel() > 1 for p in model.parameters())


def sketches(count=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, size, generator=generator))


def rows_of(own, losses):
    return {
        i: (row.clone(), loss)
        for i, (row, loss) in enumerate(zip(own, losses, strict=False))
    }


def test_equal_rows_are_right_and_each_other_is_named():
    own, losses = sketches(), [1.0, 2.0, 3.0]
    assert compared(rows_of(own, losses), own, losses) == []
    swapped = rows_of([own[1], own[0], own[2]], losses)
    assert [found[:16] for found in compared(swapped, own, losses)] == [
        "row 0 has cosine",
        "row 1 has cosine",
    ]
    longer = rows_of([own[0], 1.01 * own[1], own[2]], losses)
    assert compared(longer, own, losses) == ["row 1 has 1.0100 times its norm"]
    other = rows_of(own, [1.0, 2.0, 3.1])
    assert compared(other, own, losses) == ["row 2 has loss 3.1000, alone 3.0000"]
    missing = rows_of(own[:2], losses)
    assert compared(missing, own, losses) == ["rows of the examples [0, 1]"]


def test_rows_without_a_loss_have_a_direction_only():
    own, nothing = sketches(), [float("nan")] * 3
    scaled = rows_of([2 * row for row in own], nothing)
    assert compared(scaled, own, [1.0, 2.0, 3.0]) == []


def test_a_gradient_of_zero_has_a_row_of_zero():
    own = [*sketches(), torch.zeros(8)]
    losses = [1.0, 2.0, 3.0, 0.0]
    assert compared(rows_of(own, losses), own, losses) == []
    noisy = rows_of([*own[:3], own[0]], losses)
    assert compared(noisy, own, losses) == ["row 3 is of a gradient of zero"]


VERDICTS = [
    Verdict("causal", "llama", "LlamaForCausalLM", "right"),
    Verdict("image", "resnet", "ResNetForImageClassification", "refused", "why", True),
    Verdict("masked", "bert", "BertForMaskedLM", "wrong", "row 0 has cosine 0.5"),
    Verdict("ctc", "sew", "SEWForCTC", "not trained", "ImportError: sew"),
]


def test_the_page_counts_by_task_and_names_all_but_the_right():
    text = page(VERDICTS)
    assert f"transformers {transformers.__version__}" in text
    assert "**1 of 2 classes (50.0%) are right**.\nAnother 1 are refused" in text
    assert "| causal language models | 1 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| **all** | 3 | 1 | 1 | 1 | 0 | 0 | 1 |" in text
    named = "- `ResNetForImageClassification`: why (its examples see each other)"
    assert named in text
    assert "LlamaForCausalLM" not in text


def test_a_run_judges_only_classes_without_a_verdict(tmp_path):
    ctc = [case for case in cases() if case.task == "ctc"]
    lines = [asdict(Verdict("ctc", c.kind, c.name, "right")) for c in ctc]
    path = tmp_path / "census.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run_census(CensusArguments(str(tmp_path), task=["ctc"]))
    assert {verdict.name for verdict in found} == {case.name for case in ctc}
    assert "classes (100.0%) are right" in (tmp_path / "models.md").read_text()
    assert len(saved_verdicts(path)) == len(ctc)


@pytest.mark.full
def test_a_class_that_takes_too_long_is_given_up():
    (verdict,) = judged([CASES["BertForMaskedLM"]], 1, limit=0.0)
    assert (verdict.outcome, verdict.seconds) == ("timeout", 0.0)


@pytest.mark.full
def test_a_class_that_cannot_be_found_is_not_trained():
    (verdict,) = judged([Case("causal", "no", "NoSuchModel")], 1, limit=60)
    assert verdict.outcome == "not trained"
    assert "NoSuchModel" in verdict.reason


@pytest.mark.full
def test_almost_all_classes_are_right_and_none_is_wrong(tmp_path):
    found = run_census(CensusArguments(str(tmp_path), workers=2))
    outcomes = Counter(verdict.outcome for verdict in found)
    trained = len(found) - outcomes["not trained"]
    assert trained > 600
    failed = [v for v in found if v.outcome in ("wrong", "crash", "timeout")]
    assert [(v.name, v.reason) for v in failed] == []
    needless = [v for v in found if v.outcome == "refused" and not v.mixes]
    assert [(v.name, v.reason) for v in needless] == []
    mixing = sum(v.outcome == "refused" for v in found)
    assert outcomes["right"] >= 0.98 * (trained - mixing)
    assert EXAMPLES % 4 == 1
