"""One path through a recipe of the intrinsic dimension."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainingArguments, set_seed

from hf_sketch import DimensionSearch
from hf_sketch.recipes.dimension.report import save_run
from hf_sketch.recipes.dimension.runs import Task, run_dimension
from hf_sketch.recipes.training_defaults import with_small


@dataclass(frozen=True)
class DimensionRecipe:
    """A task, and its settings for a run of minutes.

    Args:
        name: name of the recipe.
        make_task: makes the model, its data and metrics from the arguments.
        small: smaller arguments for `--small`.
        small_training: smaller arguments of the Trainer for `--small`.
    """

    name: str
    make_task: Callable[[Any], Task]
    small: Mapping[str, Any]
    small_training: Mapping[str, Any]

    def run(
        self, arguments: Any, training: Seq2SeqTrainingArguments
    ) -> DimensionSearch:
        """Search, print, and save numbers, a plot, the adapter and its model card.

        Raises:
            ModuleNotFoundError: the extra `recipes` is not installed, or with `small`
                the package with the model or the tokenizer.
            ValueError: an argument or a file is bad, or full fine-tuning does not
                reach the target.
        """
        if arguments.small:
            small = {**self.small, "baseline": arguments.target is None}
            arguments = with_small(arguments, small)
            training = with_small(training, self.small_training)
        set_seed(training.seed)
        task = self.make_task(arguments)
        run = run_dimension(task, arguments, training)
        save_run(self.name, task, arguments, training, run)
        return run.search
