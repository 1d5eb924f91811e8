"""What torch does while something runs: operations, and waits for the device.

On the CPU nothing waits, but what would wait on an accelerator is known: a number that
Python reads, and a result whose shape depends on numbers.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("hf_sketch", "callbacks"))
OTHERS = ("/transformers/", "/accelerate/", "/datasets/", "/triton/")
# Ours, that call others' modules again.
AGAIN = ("hf_sketch/examples/rules/norms.py", "hf_sketch/examples/replay.py")
ON_THE_WAY = ("hf_sketch/model/fsdp.py",)  # to these
# Without work on a device.
FREE = ("view", "as_strided", "detach", "alias", "t", "transpose", "permute", "expand")
FREE += (
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "unbind",
    "split",
    "empty",
    "unfold",
)
FREE += ("split_with_sizes", "_unsafe_view", "empty_like", "new_empty", "diagonal")
FREE += ("_local_scalar_dense", "lift_fresh", "empty_strided", "is_same_size")
FREE += ("promote_types", "result_type", "set_", "resize_", "_reshape_alias")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")
WAITING += ("equal", "unique_dim", "unique_consecutive", "is_nonzero")
READING = ("tolist", "numpy", "cpu", "__array__")  # which no dispatch mode sees


class Dispatched(TorchDispatchMode):
    """Counts the operations that our own code asks for, and notes its waits.

    Operations that the Trainer or a model asks for are not counted, but for those
    within our hooks. Those of a file are counted together. `results` are the shapes of
    what each operation gives, in order.
    """

    def __init__(self):
        super().__init__()
        self.operations = Counter()
        self.waits = Counter()
        self.results = []
        self._plain = {}

    def __enter__(self):
        for name in READING:
            self._plain[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._reading(name))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._plain.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        where = asked_by()
        if where is not None:
            if name not in FREE:
                self.operations[where.partition(":")[0], name] += 1
            if name in WAITING or selects_by_mask(name, args):
                self.waits[f"{name} at {where}"] += 1
        result = func(*args, **(kwargs or {}))
        if where is not None:
            shapes = [x.shape for x in tree_leaves(result) if torch.is_tensor(x)]
            self.results.append((where, name, shapes))
        return result

    def _reading(self, name):
        plain = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            if (where := asked_by()) is not None:
                self.waits[f"{name} at {where}"] += 1
            return plain(tensor, *args, **kwargs)

        return read


def selects_by_mask(name, args):
    """Whether the shape of the result depends on how many are true."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(
        isinstance(x, torch.Tensor) and x.dtype == torch.bool
        for x in tree_leaves(args[1])
    )


def asked_by():
    """Our line that asks for an operation or runs a module again, if there is one."""
    frame, others = sys._getframe(2), False
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS) and (not others or path.endswith(AGAIN)):
            return f"{path.removeprefix(str(ROOT) + '/')}:{frame.f_lineno}"
        if path.startswith(OURS) and not path.endswith(ON_THE_WAY):
            return None
        others = others or any(part in path for part in OTHERS)
        frame = frame.f_back
    return None
