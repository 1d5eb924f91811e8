"""Which module's calls give each trainable parameter its per-example gradients."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from hf_sketch.examples.rules.base import NoRule, Rule
from hf_sketch.examples.rules.by_module import rule_for
from hf_sketch.examples.rules.uses import Uses
from hf_sketch.model.gradient_hooks import changes_gradient

_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


class Plan:
    """The rules by which the gradients of a model's parameters are read.

    A parameter belongs to the module that holds it, or that holds a container with it.
    Modules whose parameters have hooks that change gradients are run again.
    Where a rule fails, `demote` gives the parameters of its kind (modules of one place
    in every layer, or expert) the next best: their module is run again for each
    example, then the module around it, and so on up to the model itself.

    Args:
        model: the model.
        parameters: its trainable parameters, by name in the sketch.

    Raises:
        ValueError: a module's gradients depend on the whole batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._modules = dict(model.named_modules())
        known = {id(parameter): name for name, parameter in parameters.items()}
        self.rules: list[Rule] = []
        for path, module in self._modules.items():
            if isinstance(module, _CONTAINERS):
                continue
            within = {
                attribute: known[id(parameter)]
                for attribute, parameter in module.named_parameters(
                    remove_duplicate=False
                )
                if id(parameter) in known
            }
            own = {a: n for a, n in within.items() if _holds(module, a)}
            # A parameter that a module within holds, too, is that one's to use.
            inner = {n for a, n in within.items() if a not in own}
            own = {a: n for a, n in own.items() if n not in inner}
            if own:
                hooked = any(changes_gradient(parameters[n]) for n in own.values())
                rule = (NoRule if hooked else rule_for)(module, path, own)
                if isinstance(rule, (NoRule, Uses)):  # with modules that it uses
                    rule.borrowed = {a: n for a, n in within.items() if a not in own}
                self.rules.append(rule)

    def of(self, names: Collection[str]) -> list[Rule]:
        """Return the rules of some parameters."""
        return [rule for rule in self.rules if set(rule.names.values()) & set(names)]

    def demote(self, failed: Collection[Rule], called: Collection[str]) -> None:
        """Take the next best rule for all modules of these rules' kinds.

        Args:
            failed: some of the rules.
            called: paths of the modules that were called.

        Raises:
            ValueError: there is none left.
        """
        # The model itself is the last resort, also where it shares a parameter.
        kinds = {rule.kind for rule in failed if rule.path}
        kinds = kinds or {rule.kind for rule in failed}
        chosen = [rule for rule in self.rules if rule.kind in kinds]
        self.rules = [rule for rule in self.rules if rule.kind not in kinds]
        for rule in chosen:
            if rule.path in called and not isinstance(rule, NoRule):
                self._run_again(rule.path, rule.names, rule.borrowed)
            else:
                self._move_up(rule, called)

    def _move_up(self, rule: Rule, called: Collection[str]) -> None:
        """Run the module around a rule's module again, in place of that."""
        if not rule.path:
            raise ValueError(
                "per-example gradients need the gradient of each example's outputs to "
                f"be its own, which fails for {sorted(set(rule.names.values()))[:3]} "
                f"of {type(rule.module).__name__}: freeze them with "
                "requires_grad_(False), or pass per_example=False."
            )
        path, _, inner = rule.path.rpartition(".")
        while path and path not in called:
            path, _, last = path.rpartition(".")
            inner = f"{last}.{inner}"
        moved = [
            {f"{inner}.{attribute}": name for attribute, name in names.items()}
            for names in (rule.names, rule.borrowed)
        ]
        self._run_again(path, *moved)

    def _run_again(
        self, path: str, names: dict[str, str], borrowed: dict[str, str]
    ) -> None:
        """Run a module again for parameters of its own, or of modules within it."""
        taken = {joined(path, attribute) for attribute in names}
        for rule in self.rules:
            rule.borrowed = {
                attribute: name
                for attribute, name in rule.borrowed.items()
                if joined(rule.path, attribute) not in taken
            }
        for rule in self.rules:
            if rule.path == path and isinstance(rule, NoRule):
                rule.names |= names
                rule.borrowed |= borrowed
                return
        again = NoRule(self._modules[path], path, names)
        again.borrowed = borrowed
        self.rules.append(again)


def joined(path: str, attribute: str) -> str:
    """Return the path of a module's attribute in the model."""
    return f"{path}.{attribute}" if path else attribute


def _holds(module: nn.Module, attribute: str) -> bool:
    """Return whether the module itself, or a container in it, holds the parameter."""
    return all(isinstance(m, _CONTAINERS) for m in _modules_within(module, attribute))


def _modules_within(module: nn.Module, attribute: str) -> Iterator[nn.Module]:
    """Yield the modules on the way to a parameter, without the outermost."""
    for part in attribute.split(".")[:-1]:
        module = module.get_submodule(part)
        yield module
