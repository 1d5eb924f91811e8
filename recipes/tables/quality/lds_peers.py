"""Scores of other packages for the perceptron of the digits."""

import importlib
import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from hf_sketch.recipes.tables.peers import PEERS
from hf_sketch.recipes.tables.quality.lds_methods import Row, Scores
from hf_sketch.recipes.tables.quality.lds_tasks import Digits
from hf_sketch.recipes.tables.quality.lds_training import Snapshot

Parameters = dict[str, Tensor]
Example = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PeerStudy:
    """What the peers are given.

    Args:
        task: its rows and queries.
        snapshots: snapshots of its training.
        dampings: dampings of TRAK's matrix X^T X, as a part of its mean eigenvalue;
            with 0, the default of both packages.
        hessian_dampings: added to the dense Hessian's diagonal, as they are.
    """

    task: Digits
    snapshots: list[Snapshot]
    dampings: list[float]
    hessian_dampings: list[float]

    @property
    def net(self) -> nn.Module:
        """The trained model, from pixels to logits."""
        return self.snapshots[-1].model.net


def installed() -> dict[str, str]:
    """The versions of those that are there."""
    versions = {name: PEERS[name].version for name in PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def peer_scores(
    name: str, study: PeerStudy, out_sizes: list[int], seeds: int
) -> Scores:
    """A package's scores at some projection sizes, or none if it is not installed."""
    if name not in installed():
        return
    sketched, exact = PACKAGES[name]
    for out_size in out_sizes:
        for seed in range(seeds):
            yield from sketched(study, out_size, seed)
    if exact is not None:
        yield from exact(study)


def traker_scores(study: PeerStudy, out_size: int, seed: int) -> Scores:
    """Of TRAKer with its projector for a CPU, in float32."""
    scale = float(margin_gradients(study).square().sum(1).mean())
    size = sum(p.numel() for p in study.net.parameters())
    for damping in study.dampings:
        ridge = damping * scale * len(study.task.rows) / size
        scores = _traker(study, out_size, seed, ridge)
        yield Row("traker TRAK", out_size, damping), scores


def _traker(study: PeerStudy, out_size: int, seed: int, ridge: float) -> Tensor:
    net = study.net
    rows, queries = _loader(study.task.rows, 100), _loader(study.task.queries, 100)
    with TemporaryDirectory() as directory:
        traker = importlib.import_module("trak").TRAKer(
            net,
            "image_classification",
            train_set_size=len(study.task.rows),
            save_dir=directory,
            device="cpu",
            proj_dim=out_size,
            projector_seed=seed,
            use_half_precision=False,
            lambda_reg=ridge,
            logging_level=logging.WARNING,
        )
        traker.load_checkpoint(net.state_dict(), model_id=0)
        for batch in rows:
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        count = len(study.task.queries)
        traker.start_scoring_checkpoint("queries", net.state_dict(), 0, count)
        for batch in queries:
            traker.score(batch, num_samples=len(batch[0]))
        return torch.tensor(traker.finalize_scores("queries")).T


def dattri_scores(study: PeerStudy, out_size: int, seed: int) -> Scores:
    """Of dattri's TRAK and TracIn with its projector for a CPU."""
    logging.getLogger("dattri").setLevel(logging.WARNING)
    net = study.net
    projector = {"proj_dim": out_size, "proj_max_batch_size": 32, "proj_seed": seed}
    projector["device"] = "cpu"
    rows, queries = _loader(study.task.rows), _loader(study.task.queries)
    trak = importlib.import_module("dattri.algorithm.trak").TRAKAttributor
    task = _task(net, _margin(net), [net.state_dict()])
    scale = float(margin_gradients(study).square().sum(1).mean())
    size = sum(p.numel() for p in net.parameters())
    for damping in study.dampings:
        ridge = damping * scale * len(study.task.rows) / size / out_size
        attributor = trak(
            task, _probability(net), dict(projector), regularization=ridge
        )
        attributor.cache(rows)
        yield Row("dattri TRAK", out_size, damping), attributor.attribute(queries).T
    tracin = importlib.import_module("dattri.algorithm.tracin").TracInAttributor
    states = [snapshot.model.net.state_dict() for snapshot in study.snapshots]
    rates = torch.tensor([snapshot.learning_rate for snapshot in study.snapshots])
    attributor = tracin(_task(net, _loss(net), states), rates, False, dict(projector))
    yield Row("dattri TracIn", out_size), attributor.attribute(rows, queries).T


def dattri_influence(study: PeerStudy) -> Scores:
    """Of dattri's influence function with the dense Hessian, without a projection."""
    net = study.net
    function = importlib.import_module("dattri.algorithm.influence_function")
    rows, queries = _loader(study.task.rows), _loader(study.task.queries)
    for damping in study.hessian_dampings:
        task = _task(net, _loss(net), [net.state_dict()])
        attributor = function.IFAttributorExplicit(task, regularization=damping)
        attributor.cache(rows)
        yield (
            Row("dattri explicit influence", None, damping),
            attributor.attribute(rows, queries).T,
        )


# By projections of a size and a seed, and without.
PACKAGES: dict[
    str,
    tuple[
        Callable[[PeerStudy, int, int], Scores], Callable[[PeerStudy], Scores] | None
    ],
] = {
    "traker": (traker_scores, None),
    "dattri": (dattri_scores, dattri_influence),
}


def margin_gradients(study: PeerStudy) -> Tensor:
    """Exact gradients of what TRAK takes them of, (rows, elements)."""
    net = study.net
    weights = {name: p.detach() for name, p in net.named_parameters()}
    (batch,) = _loader(study.task.rows)
    found = vmap(grad(_margin(net)), (None, 0))(weights, batch)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def _loader(examples: list[dict[str, Tensor]], batch_size: int | None = None):
    images = torch.stack([example["x"] for example in examples])
    labels = torch.stack([example["labels"] for example in examples])
    return DataLoader(TensorDataset(images, labels), batch_size or len(images))


def _task(
    net: nn.Module,
    target: Callable[[Parameters, Example], Tensor],
    states: list[Parameters],
):
    task = importlib.import_module("dattri.task").AttributionTask
    # It loads every state into the model.
    return task(loss_func=target, model=deepcopy(net), checkpoints=states)


def _loss(net: nn.Module) -> Callable[[Parameters, Example], Tensor]:
    def loss(params: Parameters, data: Example) -> Tensor:
        images, labels = data
        logits = functional_call(net, params, (images.reshape(-1, 64),))
        return nn.functional.cross_entropy(logits, labels.reshape(-1))

    return loss


def _probability(net: nn.Module) -> Callable[[Parameters, Example], Tensor]:
    return lambda params, data: torch.exp(-_loss(net)(params, data))


def _margin(net: nn.Module) -> Callable[[Parameters, Example], Tensor]:
    """log(p / (1 - p)) of the label's probability, without cancellation near p = 1."""

    def margin(params: Parameters, data: Example) -> Tensor:
        images, labels = data
        logits = functional_call(net, params, (images.reshape(-1, 64),))
        label = labels.reshape(-1, 1)
        others = logits.scatter(1, label, float("-inf")).logsumexp(1)
        return (logits.gather(1, label).squeeze(1) - others).sum()

    return margin
