"""What a forward pass does with a module's parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm", "_grouped_mm")
_SUMS = ("add", "__add__", "add_", "__iadd__")
_TENSOR: Any = Tensor
_TURNS = (_TENSOR.T.__get__, _TENSOR.mT.__get__)
_CASTS = ("to", "type", "float", "double")


@dataclass
class Use:
    """One product with weights, or one sum with biases.

    Args:
        attribute: the parameter's.
        experts: length of its first dimension, if that is one of experts.
        input: (rows, features), what weights were multiplied by; None for a bias.
        input_first: inputs lie along the first dimension of the matrix of weights.
        expert: (rows,), the expert of each row of the output; None if the parameter is
            used as a whole, with all tokens in their order.
        token: (rows,), the token of each row.
        tokens: number of tokens.
        output: the tensor whose gradient is needed.
        version: how often `output` was changed by what is understood.
    """

    attribute: str
    experts: int
    input: Tensor | None
    input_first: bool
    expert: Tensor | None
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
        experts: length of the parameter's first dimension.
        expert: expert that the part belongs to: one, (), or one per row, (rows,); None
            for the whole parameter.
        turned: the last two dimensions are exchanged.
    """

    tensor: Tensor
    attribute: str
    experts: int
    expert: Tensor | None = None
    turned: bool = False


class UseTrace(TorchFunctionMode):
    """Notes what is done within it with some parameters, and changes nothing.

    Which token a row belongs to is followed through indexing, and through all that
    keeps the number of rows.

    Args:
        parameters: parameters by attribute.
        x: the module's input, with a token in each row.
    """

    def __init__(self, parameters: Mapping[str, Tensor], x: Tensor) -> None:
        super().__init__()
        self._slices = {
            id(p): _Slice(p, name, p.shape[:1].numel())
            for name, p in parameters.items()
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
        if self._understood and torch.is_grad_enabled():
            name = "t" if func in _TURNS else getattr(func, "__name__", "")
            some = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if not any(id(x) in self._slices for x in some):
                self._follow(name, args, some, out)
            elif any(isinstance(x, Tensor) for x in _leaves(out)):
                self._note(name, args, kwargs, out)
        return out

    def found(self) -> list[Use]:
        """Return the uses, or none if one is not understood."""
        self._slices, self._tokens = {}, {}
        changed = any(_version(use.output) != use.version for use in self._uses)
        return self._uses if self._understood and not changed else []

    def _note(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
    ) -> None:
        """Note what was made of slices."""
        given = (*args, kwargs.get("bias"))
        found = {place: self._slices.get(id(x)) for place, x in enumerate(given)}
        held = {place: part for place, part in found.items() if part is not None}
        places = set(held)
        if places == {0} and name in _PRODUCTS and args[-1].shape[-1:] == (1,):
            self._multiply(args[-1], held[0], held[0].turned, kwargs, out)
        elif places == {0}:
            self._cut(held[0], name, args, out)
        elif places and places <= {1, 2} and name == "linear":
            if 1 in held:
                self._multiply(args[0], held[1], held[1].turned, kwargs, out)
            if 2 in held:
                self._add(args[0], held[2], out)
        elif places == {1} and name in _PRODUCTS:
            self._multiply(args[0], held[1], not held[1].turned, kwargs, out)
        elif places == {1} and name in _SUMS and not kwargs:
            self._add(args[0], held[1], out)
        else:
            self._understood = False

    def _cut(self, part: _Slice, name: str, args: Sequence[Any], out: Tensor) -> None:
        """Note what is a slice as well."""
        if name in _CASTS:
            self._slices[id(out)] = replace(part, tensor=out)
        elif name == "t" or (name == "transpose" and _are_last(args[1:])):
            turned = not part.turned
            self._slices[id(out)] = replace(part, tensor=out, turned=turned)
        elif name == "__getitem__" and part.expert is None and _is_index(args[1]):
            index = torch.as_tensor(args[1], device=out.device)
            self._slices[id(out)] = replace(part, tensor=out, expert=index)
        else:
            self._understood = False

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
        elif expert is None and part.tensor.dim() == 3 and token is self._every:
            # Each expert multiplies all tokens, which are repeated for each.
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
            before = use.output
            if before is not None and before.data_ptr() == out.data_ptr():
                # Changed in place, by what leaves its gradient as it is.
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
        whole = part.tensor.dim() == (1 if x is None else 2)
        fits = x is not None or part.tensor.shape[-1:] == out.shape[-1:]
        if expert is None:
            fits = fits and whole and token is self._every
        if token is None or not fits:
            self._understood = False
            return
        expert = None if expert is None else expert.expand(len(token))
        shape = part.attribute, part.experts
        version = _version(out)
        use = Use(*shape, x, input_first, expert, token, tokens, out, version)
        self._uses.append(use)

    def _follow(
        self,
        name: str,
        args: Sequence[Any],
        some: Sequence[Tensor],
        out: Any,
    ) -> None:
        """Find the tokens of what was made of others."""
        known = [t for x in some if (t := self._token_of(x)) is not None]
        if not known:
            return
        token = known[0]
        if name == "__getitem__" and isinstance(args[1], Tensor):
            if not _is_index(args[1]) or not args[1].dim():
                return
            token = token[args[1]]
        elif name == "repeat_interleave" and isinstance(args[-1], int):
            token = token.repeat_interleave(args[-1])
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
    """Return whether this is the number of a row, or one for each of many."""
    if isinstance(x, Tensor):
        return x.dtype in (torch.int64, torch.int32) and x.dim() < 2
    return isinstance(x, int)


def _are_last(dims: Sequence[int]) -> bool:
    """Return whether these are the last two of three dimensions."""
    return {dim % 3 for dim in dims} == {1, 2}


def _version(x: Tensor | None) -> int:
    return 0 if x is None else x._version
