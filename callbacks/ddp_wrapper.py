"""The DDP wrapper of a model whose parameters change their size."""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel


class DdpWrapper:
    """The DistributedDataParallel around a model, which can be given new parameters.

    DDP settles at its start which parameters it averages the gradients of, and their
    sizes. `renew` lets it do so again, as it does where it is unpickled; all else, also
    accumulation and communication hooks, stays DDP's own. Other ways are worse: DDP
    does not start if omega, the only parameter that trains, is taken out of its hands;
    and an omega of `max_dim` numbers from the start costs what growing saves.

    The Trainer shows its callbacks the bare model, so the wrapper is found when it is
    first called, before it does anything.

    Args:
        model: model inside the wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrapper: DistributedDataParallel | None = None
        self._stale = False
        self._looking = register_module_forward_pre_hook(self._look)

    @property
    def found(self) -> bool:
        """Whether the wrapper was called."""
        return self._wrapper is not None

    def renew(self) -> None:
        """Average the gradients of the parameters that there are from now on.

        All processes call it, between a step and the next forward pass.
        """
        if self._wrapper is None:
            self._stale = True
            return
        wrapper: Any = self._wrapper
        hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
        wrapper.__setstate__(wrapper.__getstate__())
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)
        self._stale = False

    def close(self) -> None:
        """Stop looking for the wrapper."""
        self._looking.remove()

    def _look(self, module: nn.Module, inputs: Any) -> None:
        """See whether the module that is called is the wrapper."""
        if isinstance(module, DistributedDataParallel) and module.module is self._model:
            self._looking.remove()
            self._wrapper = module
            if self._stale:
                self.renew()
