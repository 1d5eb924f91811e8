"""Trainings that take Hessian spectra, and what they leave."""

import torch
from safetensors.torch import load_file

from hf_sketch import load_spectra
from hf_sketch.callbacks import HessianSpectrumCallback
from tests.helpers.trained.training import tiny_trainer


def spectra_callback(steps=(0, 3), **options):
    """One that is quick."""
    settings = {"batches": 2, "krylov_dim": 4, "out_size": 64, "keep_vectors": 4}
    return HessianSpectrumCallback(steps, **{**settings, **options})


def train(tmp_path, *callbacks, resume=None, **arguments):
    trainer = tiny_trainer(tmp_path, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    """What training and evaluation logged, without times."""
    names = ("loss", "eval_loss", "grad_norm", "learning_rate", "step", "epoch")
    entries = [{n: e.get(n) for n in names} for e in trainer.state.log_history]
    return [e for e in entries if e["loss"] or e["eval_loss"]]


def assert_trained_alike(one, other):
    assert losses(one) == losses(other)
    weights, others = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def steps_of(output_dir):
    return [spectrum.step for spectrum in load_spectra(output_dir)]


def stored_batches(directory):
    stored = load_file(directory / "curvature" / "batches.safetensors")
    batches = {}
    for name, tensor in sorted(stored.items()):
        batches.setdefault(name[:6], {})[name[7:]] = tensor
    return list(batches.values())
