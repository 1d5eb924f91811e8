"""Adapters of a given number of trained parameters, one per method of PEFT."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from peft import (
    FourierFTConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from hf_sketch import SubspaceConfig

HEAD: Final = "classifier"
_ATTENTION: Final = ("query", "value")
_ALL_LINEAR: Final = ("query", "key", "value", "dense")
# Operator and layout; QK would have to fit each part of the others.
SUBSPACES: Final = {
    "affd": ("affd", "blocked"),
    "srht": ("srht", "blocked"),
    "grouped": ("srht", "grouped"),
    "qk": ("qk", "flat"),
}
_BITFIT: Final = "bitfit"

# A size, which grows with the number of trained parameters, and its largest value.
_SIZED: Final[dict[str, tuple[Callable[..., PeftConfig], str, int]]] = {
    "lora": (LoraConfig, "r", 256),
    "vera": (VeraConfig, "r", 1024),
    "vblora": (VBLoRAConfig, "num_vectors", 4096),
    "unilora": (UniLoraConfig, "theta_d_length", 2**20),
    "fourierft": (FourierFTConfig, "n_frequency", 2**16),
    "randlora": (RandLoraConfig, "r", 384),
}
_FIXED: Final[dict[str, dict[str, Any]]] = {
    "lora": {"lora_alpha": 8, "use_rslora": True},
    "vblora": {"vector_length": 64},
    "unilora": {"r": 4},
}
# The rates that tuning starts from; it goes on by factors until the best is inside.
RATES: Final = {
    "lora": 2e-3,
    "vera": 1e-2,
    "vblora": 1e-2,
    "unilora": 1e-2,
    "fourierft": 4e-2,
    "randlora": 2e-3,
    _BITFIT: 2e-3,
}
_WITH_HEAD: Final = "+head"
METHODS: Final = (*SUBSPACES, "affd+head", "grouped+head", *RATES)


def first_rate(method: str) -> float:
    """Return the learning rate that tuning starts from."""
    return RATES.get(method, 1e-3)


def adapted(
    method: str, budget: int, seed: int, new_model: Callable[[], nn.Module]
) -> nn.Module | None:
    """Return a model with the largest adapter within a budget of trained parameters.

    A classifier is trained in full, and counted, where it takes at most a third of the
    budget; below, it stays as it was drawn. In a subspace it moves as all else
    does, but for "affd+head" and "grouped+head".

    Args:
        method: one of `METHODS`.
        budget: trained parameters, at most.
        seed: draws the adapter.
        new_model: makes the model, the same each time.

    Returns:
        the model; None if the method trains at least twice fewer parameters, or more,
        whatever its settings.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    parameters = new_model().named_parameters()
    head = sum(p.numel() for name, p in parameters if name.startswith(HEAD))
    saved = [HEAD] if 0 < 3 * head <= budget else []
    subspace = SUBSPACES.get(method.removesuffix(_WITH_HEAD))
    if subspace is not None:
        whole = method in SUBSPACES
        if not whole and not saved:
            return None
        dim = budget if whole else budget - head
        config = SubspaceConfig(
            dim=dim,
            operator=subspace[0],
            layout=subspace[1],
            seed=seed,
            modules_to_save=None if whole else saved,
        )
        return get_peft_model(new_model(), config)
    if method == _BITFIT:
        return _with_biases(new_model(), budget, bool(saved))
    largest = _largest(method, budget, seed, saved, new_model)
    if largest is None or 2 * trained(largest) <= budget:
        return None
    return largest


def trained(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _largest(
    method: str,
    budget: int,
    seed: int,
    saved: list[str],
    new_model: Callable[[], nn.Module],
) -> nn.Module | None:
    """The adapter on as many modules as fit, then of the largest size that fits."""
    make, size, most = _SIZED[method]
    settings = {**_FIXED.get(method, {}), "modules_to_save": saved or None}
    seeded = {"vera": "projection_prng_key", "randlora": "projection_prng_key"}
    seeded |= {"unilora": "proj_seed", "fourierft": "random_loc_seed"}
    if method in seeded:
        settings[seeded[method]] = seed
    best: nn.Module | None = None
    for targets in _targets(new_model()):

        def at(value: int, targets: list[str] = targets) -> nn.Module:
            config = make(target_modules=targets, **{size: value}, **settings)
            return get_peft_model(new_model(), config)

        found = _last_fitting(at, budget, most, least=2 if method == "vblora" else 1)
        if found is not None and (best is None or trained(found) > trained(best)):
            best = found
        if best is not None and 2 * trained(best) > budget:
            return best
    return best


def _last_fitting(
    at: Callable[[int], nn.Module], budget: int, most: int, least: int
) -> nn.Module | None:
    """The model with most trained parameters within the budget, of sizes to `most`.

    The number may fall with the size, as RandLora's does with the rank.
    """
    ends = trained(at(least)), trained(at(most))
    falls = ends[0] > ends[1]
    if min(ends) > budget:
        return None
    low, high = least, most  # the count is monotonous in between
    while low < high:
        middle = (low + high) // 2 if falls else (low + high + 1) // 2
        fits = trained(at(middle)) <= budget
        if falls:
            low, high = (low, middle) if fits else (middle + 1, high)
        else:
            low, high = (middle, high) if fits else (low, middle - 1)
    return at(low)


def _targets(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules: queries and values of all layers, then fewer, then all kinds.

    The last layers are kept, for their gradients are the cheapest.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    layers = [n for n in linear if ".layer." in n]
    attention = [n for n in layers if n.rsplit(".", 1)[1] in _ATTENTION]
    for first in range(0, len(attention), 2):
        yield attention[first:]
    yield attention[-1:]
    yield [n for n in layers if n.rsplit(".", 1)[1] in _ALL_LINEAR]


def _with_biases(model: nn.Module, budget: int, head: bool) -> nn.Module | None:
    """The model with biases alone trained, of as many last layers as fit."""
    names = [n for n, _ in model.named_parameters() if n.endswith(".bias")]
    kept = {n for n, _ in model.named_parameters() if head and n.startswith(HEAD)}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    left = budget - sum(sizes[name] for name in kept)
    for name in reversed([n for n in names if n not in kept]):
        if not head and name.startswith(HEAD):
            continue
        if sizes[name] > left:
            break
        left -= sizes[name]
        kept.add(name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return model if kept and 2 * trained(model) > budget else None
