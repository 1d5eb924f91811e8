"""Accuracy, a metric script for `evaluate`."""

from collections.abc import Sequence

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their references, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="The share of predictions that equal their references.",
            citation="",
            inputs_description="predictions, references: class numbers.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int]
    ) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(p == r for p, r in pairs) / len(pairs)}
