"""Section 5.5 of the paper: Hessian spectra while a model is fine-tuned."""

import argparse
from pathlib import Path

from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_sketch import ModelSketch, Spectrum, load_spectra
from hf_sketch.callbacks import HessianSpectrumCallback
from hf_sketch.recipes.options.hessian import HESSIAN_TRAINING, HessianArguments
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.setups import Setup, snli_setup, xsum_setup
from hf_sketch.recipes.spectrum_report import (
    plots_if_installed,
    print_spectra,
    summary_of,
)
from hf_sketch.recipes.timed_spectra import TimedSpectra
from hf_sketch.recipes.training_defaults import with_defaults, with_small

HessianTrainingArguments = with_defaults(
    TrainingArguments, HESSIAN_TRAINING, "HessianTrainingArguments", __name__
)

_SMALL = {"steps": "0,10,30,100", "batches": 2, "krylov_dim": 30, "out_size": 2**14}
_SMALL_TRAINING = {
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.1,
    "dataloader_pin_memory": False,
}


def run_hessian(
    arguments: HessianArguments, training: TrainingArguments
) -> list[Spectrum]:
    """Fine-tune, take spectra, print them, and save them with plots.

    Raises:
        ModuleNotFoundError: `small`, and the package with the model is not installed.
        ValueError: an argument, the training file or the sketch's size is bad.
    """
    if arguments.small:
        arguments = with_small(arguments, _SMALL)
        training = with_small(training, _SMALL_TRAINING)
    spectra_callback = _callback(arguments)
    set_seed(training.seed)
    setup = _setup(arguments)
    _print_plan(arguments, training, setup)
    timed = TimedSpectra(spectra_callback)
    trainer = Trainer(
        setup.model,
        training,
        data_collator=setup.collator,
        train_dataset=setup.train_dataset,
        processing_class=setup.tokenizer,
        callbacks=[timed],
    )
    spectra_callback.set_trainer(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    spectra = load_spectra(training.output_dir)
    print_spectra(spectra)
    _save(arguments, training, setup, spectra, timed.seconds)
    return spectra


def _callback(arguments: HessianArguments) -> HessianSpectrumCallback:
    """As asked, with the Trainer's seed and batch size."""
    return HessianSpectrumCallback(
        steps=[int(step) for step in arguments.steps.split(",")],
        every=arguments.every or None,
        batches=arguments.batches,
        krylov_dim=arguments.krylov_dim,
        out_size=arguments.out_size,
        operator=arguments.operator,
        layout=arguments.layout,
        mode=arguments.mode,
        keep_vectors=arguments.keep_vectors,
    )


def _setup(arguments: HessianArguments) -> Setup:
    """The task's model and data."""
    given = arguments.model_name_or_path, arguments.train_file, arguments.small
    if arguments.task == "snli":
        return snli_setup(*given)
    return xsum_setup(*given, arguments.max_source_length, arguments.max_target_length)


def _print_plan(
    arguments: HessianArguments, training: TrainingArguments, setup: Setup
) -> None:
    """Say what will be done, and raise if the sketch does not fit the model."""
    sketch = ModelSketch.from_model(
        setup.model,
        arguments.out_size,
        arguments.layout,
        training.seed,
        arguments.operator,
    )
    basis = 4 * arguments.krylov_dim * arguments.out_size / 2**30
    print(
        f"{setup.name}: {len(setup.train_dataset):,} examples, {sketch.in_size:,} "
        f"parameters sketched to {sketch.out_size:,} numbers; {arguments.krylov_dim} "
        f"products a spectrum, whose basis takes {basis:.3g} GiB"
    )


def _save(
    arguments: HessianArguments,
    training: TrainingArguments,
    setup: Setup,
    spectra: list[Spectrum],
    seconds: dict[int, float],
) -> None:
    """Write results.json and the plots."""
    results = [{**summary_of(s), "seconds": seconds.get(s.step)} for s in spectra]
    settings = argparse.Namespace(
        **vars(arguments), name=setup.name, training=training.to_dict()
    )
    directory = Path(training.output_dir)
    print("saved", save_report(str(directory), "results", settings, results))
    plots = plots_if_installed()
    if plots is not None:
        figures = {
            "figure_2": plots.plot_figure_2({setup.name: spectra}),
            "density": plots.plot_density(spectra[-1]),
        }
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.svg")
            print("saved", directory / f"{name}.svg")


if __name__ == "__main__":
    parser = HfArgumentParser((HessianArguments, HessianTrainingArguments))
    run_hessian(*parser.parse_args_into_dataclasses())
