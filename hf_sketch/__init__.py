"""Sketches of gradients and Hessians for training data attribution."""

from importlib.metadata import version

from hf_sketch.attribution.checkpoints import concatenate_sketches, sketch_checkpoints
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
from hf_sketch.curvature.check import CurvatureCheck
from hf_sketch.curvature.gauss_newton import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
)
from hf_sketch.curvature.hessian import HessianOperator, hessian_vector_product
from hf_sketch.curvature.operator import SymmetricOperator
from hf_sketch.examples.losses import ExampleLosses, example_losses
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.examples.sketcher import ExampleBatch, ExampleSketcher
from hf_sketch.model.implicit import implicit_sketch
from hf_sketch.model.sketch import Coverage, ModelSketch
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
from hf_sketch.subspace.config import SubspaceConfig
from hf_sketch.subspace.growth import grow_subspace
from hf_sketch.subspace.search import (
    DimensionSearch,
    Stage,
    load_dimension_search,
)

__version__ = version("hf-sketch")

__all__ = [
    "AFFD",
    "AFJL",
    "FFD",
    "FJL",
    "QK",
    "SRHT",
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
    "HessianOperator",
    "Influence",
    "LanczosResult",
    "MeasuredError",
    "Method",
    "ModelSketch",
    "Preconditioned",
    "RowIndex",
    "Sketch",
    "SketchedHessian",
    "SpectralDensity",
    "Spectrum",
    "Stage",
    "SubspaceConfig",
    "SymmetricOperator",
    "TracIn",
    "TraceEstimate",
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
    "sketch_checkpoints",
    "sketch_dataset",
    "spectral_density",
]
