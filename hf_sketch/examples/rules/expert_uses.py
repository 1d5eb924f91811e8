"""What a forward pass does with parameters that hold a slice for each expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm", "_grouped_mm")
_SUMS = ("add", "__add__", "add_", "__iadd__")


@dataclass
class Use:
    """One product with experts' weights, or one sum with their biases.

    Args:
        attribute: the parameter's.
        experts: number of experts.
        input: (rows, features), what weights were multiplied by; None for a bias.
        input_first: inputs lie along the first dimension of an expert's weight.
        expert: (rows,), the expert of each row of the output.
        token: (rows,), the token of each row.
        tokens: number of tokens.
        output: the tensor whose gradient is needed.
        version: how often `output` was changed by what is understood.
    """

    attribute: str
    experts: int
    input: Tensor | None
    input_first: bool
    expert: Tensor
    token: Tensor
    tokens: int
    output: Tensor | None
    version: int

    def release(self) -> Tensor:
        """Return the output, and let go of it."""
        output, self.output = self.output, None
        assert output is not None
        return output


@dataclass(frozen=True)
class _Slice:
    """A part of a parameter.

    Args:
        tensor: the part, kept so that no other tensor gets its identity.
        attribute: the parameter's.
        experts: number of experts in the parameter.
        expert: whose part it is: one expert, () or one for each row, (rows,); None for
            all of them.
        turned: the last two dimensions are exchanged.
    """

    tensor: Tensor
    attribute: str
    experts: int
    expert: Tensor | None = None
    turned: bool = False


class UseTrace(TorchFunctionMode):
    """Notes what is done within it with experts' parameters, and changes nothing.

    Which token a row belongs to is followed through indexing, and through all that
    keeps the number of rows.

    Args:
        parameters: by attribute; experts lie along their first dimension.
        x: the module's input, with a token in each row.
    """

    def __init__(self, parameters: Mapping[str, Tensor], x: Tensor) -> None:
        super().__init__()
        self._slices = {
            id(p): _Slice(p, name, len(p)) for name, p in parameters.items()
        }
        self._every = torch.arange(_rows(x), device=x.device)
        self._tokens = {id(x): (x, self._every)}
        self._uses: list[Use] = []
        self._understood = True

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch.is_grad_enabled():
            some = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if any(id(x) in self._slices for x in some):
                if any(isinstance(x, Tensor) for x in _leaves(out)):
                    self._note(func.__name__, args, kwargs, out)
            else:
                self._follow(func.__name__, args, kwargs, some, out)
        return out

    def found(self) -> list[Use]:
        """Return the uses, or none if one is not understood."""
        self._slices, self._tokens = {}, {}
        changed = any(_version(use.output) != use.version for use in self._uses)
        return self._uses if self._understood and not changed else []

    def _note(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
    ) -> None:
        """Note what was made of a slice."""
        held = [self._slices.get(id(x)) for x in args]
        first, second = (*held, None, None)[:2]
        if first is not None and name == "__getitem__":
            self._take(first, args[1], out)
        elif first is not None and name == "transpose" and _are_last(args[1:]):
            turned = replace(first, tensor=out, turned=not first.turned)
            self._slices[id(out)] = turned
        elif second is not None and name == "linear":
            self._multiply(args[0], second, second.turned, kwargs, out)
            if bias := (*held, None)[2]:
                self._add(args[0], bias, out)
        elif second is not None and name in _PRODUCTS:
            self._multiply(args[0], second, not second.turned, kwargs, out)
        elif first is not None and name in _PRODUCTS and args[1].shape[-1] == 1:
            self._multiply(args[1], first, first.turned, kwargs, out)
        elif second is not None and name in _SUMS:
            self._add(args[0], second, out)
        else:
            self._understood = False

    def _take(self, whole: _Slice, index: Any, out: Tensor) -> None:
        """Note the slice of some experts."""
        if isinstance(index, int):
            index = torch.tensor(index, device=out.device)
        if not _is_index(index) or index.dim() > 1 or whole.expert is not None:
            self._understood = False
        else:
            self._slices[id(out)] = replace(whole, tensor=out, expert=index)

    def _multiply(
        self,
        x: Tensor,
        part: _Slice,
        input_first: bool,
        kwargs: Mapping[str, Any],
        out: Tensor,
    ) -> None:
        """Note a product."""
        expert, token = part.expert, self._token_of(x)
        tokens = len(self._every)
        if token is None:
            self._understood = False
            return
        if "offs" in kwargs:  # rows are sorted by expert
            places = torch.arange(len(token), device=x.device, dtype=torch.int32)
            expert = torch.searchsorted(kwargs["offs"], places, right=True)
        elif expert is None and token is self._every:  # all tokens, for each expert
            tokens = len(token) // part.experts
            places = torch.arange(part.experts, device=x.device)
            expert = places.repeat_interleave(tokens)
            token = torch.arange(tokens, device=x.device).repeat(part.experts)
        kept = x.detach().reshape(len(token), -1)
        self._use(part, kept, input_first, expert, token, tokens, out)
        self._keep(out, self._token_of(x))

    def _add(self, x: Tensor, part: _Slice, out: Tensor) -> None:
        """Note a sum with biases."""
        for use in self._uses:
            if use.output is out:  # changed in place, by what leaves gradients alone
                use.version = _version(out)
        token = self._token_of(x)
        self._use(part, None, False, part.expert, token, len(self._every), out)
        self._keep(out, token)

    def _use(
        self,
        part: _Slice,
        x: Tensor | None,
        input_first: bool,
        expert: Tensor | None,
        token: Tensor | None,
        tokens: int,
        out: Tensor,
    ) -> None:
        if expert is None or token is None:
            self._understood = False
            return
        expert = expert.expand(len(token))
        shape = part.attribute, part.experts
        version = _version(out)
        use = Use(*shape, x, input_first, expert, token, tokens, out, version)
        self._uses.append(use)

    def _follow(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        some: Sequence[Tensor],
        out: Any,
    ) -> None:
        """Find the tokens of what was made of others."""
        known = [t for x in some if (t := self._token_of(x)) is not None]
        if not known:
            return
        token = known[0]
        if name == "__getitem__" and isinstance(args[1], Tensor):
            if not _is_index(args[1]) or args[1].dim() != 1:
                return
            token = token[args[1]]
        elif name == "repeat_interleave" and isinstance(args[1], int):
            token = token.repeat_interleave(args[1])
        for x in _leaves(out):
            self._keep(x, token)

    def _token_of(self, x: Tensor) -> Tensor | None:
        return self._tokens.get(id(x), (x, None))[1]

    def _keep(self, x: Any, token: Tensor | None) -> None:
        """Note the tokens of a tensor's rows."""
        if token is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if x.dim() and len(token) in (len(x), _rows(x)):
            self._tokens[id(x)] = x, token


def _leaves(out: Any) -> Sequence[Any]:
    return out if isinstance(out, (tuple, list)) else [out]


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _is_index(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)


def _are_last(dims: Sequence[int]) -> bool:
    """Return whether these are the last two of three dimensions."""
    return {dim % 3 for dim in dims} == {1, 2}


def _version(x: Tensor | None) -> int:
    return 0 if x is None else x._version
