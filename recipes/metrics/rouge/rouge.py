"""ROUGE, a metric script for `evaluate`."""

from collections.abc import Sequence
from statistics import fmean

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    """Mean F-measures of common words, pairs and subsequences, in [0, 100]."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean F-measures of ROUGE-1, -2 and -L, times 100.",
            citation="",
            inputs_description="predictions, references: texts; use_stemmer: whether "
            "words are compared by their Porter stems.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        use_stemmer: bool = True,
    ) -> dict[str, float]:
        scorer = RougeScorer(_KINDS, use_stemmer=use_stemmer)
        pairs = zip(references, predictions, strict=True)
        scores = [scorer.score(reference, guess) for reference, guess in pairs]
        return {kind: 100 * fmean(s[kind].fmeasure for s in scores) for kind in _KINDS}
