"""What is leaned on in torch beneath its public names, as read in torch 2.13."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint


def test_trees_are_mapped_and_flattened():
    tree = {"a": [1, (2,)], "b": 3}
    assert tree_map(lambda leaf: leaf + 1, tree) == {"a": [2, (3,)], "b": 4}
    assert tree_leaves(tree) == [1, 2, 3]


def test_a_change_in_place_counts_in_the_version():
    parameter = nn.Parameter(torch.zeros(2))
    before = parameter._version
    with torch.no_grad():
        parameter.add_(1.0)
    assert parameter._version > before


def test_hooks_after_accumulation_can_be_exchanged_and_put_back():
    parameter, theirs, ours = nn.Parameter(torch.zeros(2)), [], []
    parameter.register_post_accumulate_grad_hook(theirs.append)
    kept = parameter._post_accumulate_grad_hooks
    parameter._post_accumulate_grad_hooks = None  # effective with the next registration
    handle = parameter.register_post_accumulate_grad_hook(ours.append)
    parameter.sum().backward()
    assert (len(theirs), len(ours)) == (0, 1)
    handle.remove()
    parameter._post_accumulate_grad_hooks = kept
    parameter.sum().backward()
    assert (len(theirs), len(ours)) == (1, 1)


def test_hooks_on_the_gradient_of_a_parameter_can_be_read():
    parameter = nn.Parameter(torch.zeros(2))
    assert not parameter._backward_hooks
    parameter.register_hook(lambda gradient: 2 * gradient)
    (hook,) = parameter._backward_hooks.values()
    copy = parameter.detach().requires_grad_()
    copy.register_hook(hook)
    (got,) = torch.autograd.grad(copy.sum(), copy)
    assert got.tolist() == [2.0, 2.0]


def test_modules_keep_their_parameters_in_a_dictionary_that_may_be_changed():
    layer = nn.Linear(2, 2)
    plain = torch.ones(2, 2)
    vars(layer)["_parameters"]["weight"] = plain
    assert layer.weight is plain
    assert layer(torch.ones(2)).shape == (2,)


def test_moving_and_casting_goes_through_apply():
    class Counted(nn.Linear):
        def _apply(self, fn, recurse=True):
            self.calls = getattr(self, "calls", 0) + 1
            return super()._apply(fn, recurse)

    layer = Counted(2, 2)
    layer.to(torch.float64)
    layer.cpu()
    assert layer.calls == 2


def test_compiled_modules_bear_a_mark():
    layer = nn.Linear(2, 2)
    assert layer._compiled_call_impl is None
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert isinstance(wrapped._orig_mod, nn.Linear)


def test_the_wrapper_of_processes_is_made_again_from_its_state(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(nn.Linear(2, 2))
        assert wrapper._comm_hooks == []
        wrapper.__setstate__(wrapper.__getstate__())
        wrapper(torch.ones(1, 2)).sum().backward()
        assert wrapper.module.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_on_saved_tensors_can_be_seen():
    def seen():
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    within = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: within.append(seen()))
    x = torch.ones(1, 2)
    checkpoint(layer, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        layer(x)
    layer(x)
    assert within == [True, True, False]
