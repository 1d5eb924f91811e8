"""The classes of Transformers' auto mappings, by task."""

from collections.abc import Iterator
from dataclasses import dataclass

import transformers
from transformers.models.auto import modeling_auto

TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "masked": "MASKED_LM",
    "sequence": "SEQUENCE_CLASSIFICATION",
    "token": "TOKEN_CLASSIFICATION",
    "question": "QUESTION_ANSWERING",
    "choice": "MULTIPLE_CHOICE",
    "image": "IMAGE_CLASSIFICATION",
    "audio": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech": "SPEECH_SEQ_2_SEQ",
    "image-text": "IMAGE_TEXT_TO_TEXT",
}


@dataclass(frozen=True)
class Case:
    """A class of models in the first auto mapping that names it.

    Args:
        task: a key of `TASKS`.
        kind: the model type by which the mapping lists it.
        name: name of the class.
    """

    task: str
    kind: str
    name: str

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.name)


def cases() -> Iterator[Case]:
    """Yield every class once, in the order of the mappings."""
    seen: set[str] = set()
    for task, mapping in TASKS.items():
        listed = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for kind, names in listed.items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield Case(task, kind, name)
