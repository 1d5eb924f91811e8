"""Sketches of gradients and Hessians for training data attribution.

Public names load their modules when first used, so that `import hf_sketch` is fast.
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_sketch.attribution.checkpoints import (
        concatenate_sketches,
        sketch_checkpoints,
    )
    from hf_sketch.attribution.collection import GradientRows
    from hf_sketch.attribution.dataset import sketch_dataset
    from hf_sketch.attribution.index import RowIndex
    from hf_sketch.attribution.loading import load_sketches
    from hf_sketch.attribution.methods import (
        Cosine,
        Dot,
        Influence,
        Method,
        Preconditioned,
        TracIn,
    )
    from hf_sketch.attribution.questions.certified import CertifiedTop
    from hf_sketch.attribution.questions.tokens import TokenScores
    from hf_sketch.attribution.questions.trainings import (
        CombinedScores,
        combine_scores,
    )
    from hf_sketch.curvature.check import CurvatureCheck
    from hf_sketch.curvature.gauss_newton import (
        EmpiricalFisherOperator,
        GaussNewtonOperator,
    )
    from hf_sketch.curvature.hessian import HessianOperator, hessian_vector_product
    from hf_sketch.curvature.operator import SymmetricOperator
    from hf_sketch.examples.batch import ExampleBatch
    from hf_sketch.examples.losses import ExampleLosses, example_losses
    from hf_sketch.examples.measured_error import MeasuredError
    from hf_sketch.examples.sketcher import ExampleSketcher
    from hf_sketch.ledger.updates import load_updates
    from hf_sketch.ledger.verify import TrainingCheck, verify_training
    from hf_sketch.model.coverage import Coverage
    from hf_sketch.model.implicit import implicit_sketch
    from hf_sketch.model.normalizer import Normalizer
    from hf_sketch.model.sketch import ModelSketch
    from hf_sketch.sketches import (
        AFFD,
        AFJL,
        FFD,
        FJL,
        QK,
        SRHT,
        Composed,
        CounterRandom,
        Dense,
        Grouped,
        Sketch,
    )
    from hf_sketch.spectra.density import (
        SpectralDensity,
        TraceEstimate,
        estimate_trace,
        spectral_density,
    )
    from hf_sketch.spectra.files import load_spectra
    from hf_sketch.spectra.lanczos_run import LanczosResult, lanczos
    from hf_sketch.spectra.sketched_hessian import SketchedHessian
    from hf_sketch.spectra.spectrum import Spectrum, hessian_spectrum
    from hf_sketch.subspace.growth import grow_subspace
    from hf_sketch.subspace.search import (
        DimensionSearch,
        Stage,
        load_dimension_search,
    )
    from hf_sketch.subspace.tuner import SubspaceConfig

__version__ = version("hf-sketch")

__all__ = [
    "AFFD",
    "AFJL",
    "FFD",
    "FJL",
    "QK",
    "SRHT",
    "CertifiedTop",
    "CombinedScores",
    "Composed",
    "Cosine",
    "CounterRandom",
    "Coverage",
    "CurvatureCheck",
    "Dense",
    "DimensionSearch",
    "Dot",
    "EmpiricalFisherOperator",
    "ExampleBatch",
    "ExampleLosses",
    "ExampleSketcher",
    "GaussNewtonOperator",
    "GradientRows",
    "Grouped",
    "HessianOperator",
    "Influence",
    "LanczosResult",
    "MeasuredError",
    "Method",
    "ModelSketch",
    "Normalizer",
    "Preconditioned",
    "RowIndex",
    "Sketch",
    "SketchedHessian",
    "SpectralDensity",
    "Spectrum",
    "Stage",
    "SubspaceConfig",
    "SymmetricOperator",
    "TokenScores",
    "TracIn",
    "TraceEstimate",
    "TrainingCheck",
    "combine_scores",
    "concatenate_sketches",
    "estimate_trace",
    "example_losses",
    "grow_subspace",
    "hessian_spectrum",
    "hessian_vector_product",
    "implicit_sketch",
    "lanczos",
    "load_dimension_search",
    "load_sketches",
    "load_spectra",
    "load_updates",
    "sketch_checkpoints",
    "sketch_dataset",
    "spectral_density",
    "verify_training",
]

_MODULES = {
    "AFFD": "sketches",
    "AFJL": "sketches",
    "FFD": "sketches",
    "FJL": "sketches",
    "QK": "sketches",
    "SRHT": "sketches",
    "CertifiedTop": "attribution.questions.certified",
    "CombinedScores": "attribution.questions.trainings",
    "Composed": "sketches",
    "Cosine": "attribution.methods",
    "CounterRandom": "sketches",
    "Coverage": "model.coverage",
    "CurvatureCheck": "curvature.check",
    "Dense": "sketches",
    "DimensionSearch": "subspace.search",
    "Dot": "attribution.methods",
    "EmpiricalFisherOperator": "curvature.gauss_newton",
    "ExampleBatch": "examples.batch",
    "ExampleLosses": "examples.losses",
    "ExampleSketcher": "examples.sketcher",
    "GaussNewtonOperator": "curvature.gauss_newton",
    "GradientRows": "attribution.collection",
    "Grouped": "sketches",
    "HessianOperator": "curvature.hessian",
    "Influence": "attribution.methods",
    "LanczosResult": "spectra.lanczos_run",
    "MeasuredError": "examples.measured_error",
    "Method": "attribution.methods",
    "ModelSketch": "model.sketch",
    "Normalizer": "model.normalizer",
    "Preconditioned": "attribution.methods",
    "RowIndex": "attribution.index",
    "Sketch": "sketches",
    "SketchedHessian": "spectra.sketched_hessian",
    "SpectralDensity": "spectra.density",
    "Spectrum": "spectra.spectrum",
    "Stage": "subspace.search",
    "SubspaceConfig": "subspace.tuner",  # which enters it in PEFT's tables
    "SymmetricOperator": "curvature.operator",
    "TokenScores": "attribution.questions.tokens",
    "TracIn": "attribution.methods",
    "TraceEstimate": "spectra.density",
    "TrainingCheck": "ledger.verify",
    "combine_scores": "attribution.questions.trainings",
    "concatenate_sketches": "attribution.checkpoints",
    "estimate_trace": "spectra.density",
    "example_losses": "examples.losses",
    "grow_subspace": "subspace.growth",
    "hessian_spectrum": "spectra.spectrum",
    "hessian_vector_product": "curvature.hessian",
    "implicit_sketch": "model.implicit",
    "lanczos": "spectra.lanczos_run",
    "load_dimension_search": "subspace.search",
    "load_sketches": "attribution.loading",
    "load_spectra": "spectra.files",
    "load_updates": "ledger.updates",
    "sketch_checkpoints": "attribution.checkpoints",
    "sketch_dataset": "attribution.dataset",
    "spectral_density": "spectra.density",
    "verify_training": "ledger.verify",
}

# Old names, which still work: remove each two minor versions after its renaming.
_RENAMED = {
    "ExampleRows": "ExampleBatch",  # 0.2
    "PerExampleSketcher": "ExampleSketcher",  # 0.2
    "Sketches": "GradientRows",  # 0.2
}


def __getattr__(name: str) -> Any:
    new = _RENAMED.get(name, name)
    if new not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if new != name:
        warnings.warn(
            f"hf_sketch.{name} was renamed: use hf_sketch.{new}.",
            DeprecationWarning,
            stacklevel=2,
        )
    return getattr(import_module(f"{__name__}.{_MODULES[new]}"), new)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
