"""Sketches of gradients and Hessians for training data attribution."""

from importlib.metadata import version

from hf_sketch.checkpoint_sketches import concatenate_sketches, sketch_checkpoints
from hf_sketch.collection import Sketches
from hf_sketch.curvature import HessianOperator, hessian_vector_product
from hf_sketch.curvature_check import CurvatureCheck
from hf_sketch.example_losses import ExampleLosses, example_losses
from hf_sketch.gauss_newton import EmpiricalFisherOperator, GaussNewtonOperator
from hf_sketch.implicit import implicit_sketch
from hf_sketch.intrinsic_dimension import (
    DimensionSearch,
    Stage,
    load_dimension_search,
)
from hf_sketch.lanczos import LanczosResult, lanczos
from hf_sketch.loading import load_sketches
from hf_sketch.measured_error import MeasuredError
from hf_sketch.methods import Cosine, Dot, Influence, Method, Preconditioned, TracIn
from hf_sketch.model_sketch import Coverage, ModelSketch
from hf_sketch.per_example import ExampleRows, PerExampleSketcher
from hf_sketch.row_index import RowIndex
from hf_sketch.sketch_dataset import sketch_dataset
from hf_sketch.sketched_hessian import SketchedHessian
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
from hf_sketch.spectral_density import (
    SpectralDensity,
    TraceEstimate,
    estimate_trace,
    spectral_density,
)
from hf_sketch.spectrum import Spectrum, hessian_spectrum
from hf_sketch.spectrum_files import load_spectra
from hf_sketch.subspace_config import SubspaceConfig
from hf_sketch.subspace_growth import grow_subspace
from hf_sketch.symmetric_operator import SymmetricOperator

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
    "ExampleLosses",
    "ExampleRows",
    "GaussNewtonOperator",
    "HessianOperator",
    "Influence",
    "LanczosResult",
    "MeasuredError",
    "Method",
    "ModelSketch",
    "PerExampleSketcher",
    "Preconditioned",
    "RowIndex",
    "Sketch",
    "SketchedHessian",
    "Sketches",
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
