"""The page of the documentation that the census writes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import transformers

from hf_sketch.recipes.tables.census.judge import Verdict
from hf_sketch.recipes.tables.census.tasks import TASKS

_MEDIA = ("pixel", "patches", "features", "input_values")
_OUTCOMES = ("right", "refused", "wrong", "crash", "timeout")
_NAMES: Mapping[str, str] = {
    "causal": "causal language models",
    "seq2seq": "sequence to sequence",
    "masked": "masked language models",
    "sequence": "sequence classification",
    "token": "token classification",
    "question": "question answering",
    "choice": "multiple choice",
    "image": "image classification",
    "audio": "audio classification",
    "ctc": "CTC",
    "speech": "speech to text",
    "image-text": "image and text to text",
}


def page(verdicts: Iterable[Verdict]) -> str:
    """Return the page as Markdown."""
    found = sorted(verdicts, key=lambda verdict: verdict.name)
    trained = [v for v in found if v.outcome != "not trained"]
    right = sum(v.outcome == "right" for v in trained)
    mixing = sum(v.outcome == "refused" and v.mixes for v in trained)
    apart = len(trained) - mixing
    lines = [
        "# Models",
        "",
        "Which model classes does recording support? The census builds a tiny random",
        "model of every class in Transformers' auto mappings. It trains the model",
        "twice, without the callback and with it. A class is right if each of its",
        "nine examples has a row that matches the sketch of the example's own",
        "gradient. Cosine, norm and loss must agree within 0.1%. Classes that do not",
        "train without the callback do not count. The census generates this page.",
        "",
        f"With transformers {transformers.__version__} and torch {torch.__version__},",
        f"**{right} of {apart} classes ({right / max(1, apart):.1%}) are right**.",
        f"Another {mixing} are refused because their examples see each other, through",
        "BatchNorm in training mode or through the loss. No example there has a",
        "gradient of its own.",
        "",
        "```bash",
        "python -m hf_sketch.recipes.tables.census --page docs/models.md",
        "python -m hf_sketch.recipes.tables.census --only BertForMaskedLM",
        "```",
        "",
        *_table(found),
        *_text_alone(trained),
        *_list("Refused", _of(found, "refused")),
        *_list(
            "Wrong, crashed or out of time", _of(found, "wrong", "crash", "timeout")
        ),
        *_list("Not trained without the callback", _of(found, "not trained")),
    ]
    return "\n".join(lines) + "\n"


def _table(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the counts by task and overall."""
    header = ["task", "trained", *_OUTCOMES, "not trained"]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * 7 + "|"]
    for task in TASKS:
        lines.append(_counts(_NAMES[task], [v for v in verdicts if v.task == task]))
    return [*lines, _counts("**all**", verdicts)]


def _text_alone(trained: Sequence[Verdict]) -> list[str]:
    """Name the models of images or sounds that saw none."""
    names = [
        f"`{v.name}`"
        for v in trained
        if v.task in ("speech", "image-text") and not any(m in v.inputs for m in _MEDIA)
    ]
    if not names:
        return []
    return [
        "",
        "These classes were trained on text alone, without an image or sound: "
        f"{', '.join(names)}.",
    ]


def _counts(name: str, verdicts: Sequence[Verdict]) -> str:
    """Return a line of the table."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    trained = len(verdicts) - counts["not trained"]
    numbers = [trained, *(counts[o] for o in _OUTCOMES), counts["not trained"]]
    return "| " + " | ".join([name, *map(str, numbers)]) + " |"


def _of(verdicts: Sequence[Verdict], *outcomes: str) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome in outcomes]


def _list(title: str, verdicts: Sequence[Verdict]) -> list[str]:
    """Return a section that names each class once, grouped by reason."""
    if not verdicts:
        return []
    groups: dict[str, list[str]] = {}
    for verdict in verdicts:
        reason = verdict.reason.replace("|", "/").replace(verdict.name, "the class")
        mixed = " (its examples see each other)" if verdict.mixes else ""
        groups.setdefault(f"{reason[:200]}{mixed}", []).append(f"`{verdict.name}`")
    lines = ["", f"## {title}", ""]
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"- {', '.join(names)}: {reason}")
    return lines
