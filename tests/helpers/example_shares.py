"""Each example's share of a batch's gradient, by passes of its rows alone."""

import torch


class ExampleShares:
    """Notes the gradients of the examples' shares of each backward pass's loss.

    The loss is differentiated by the model's outputs, which then stand as constants
    before the outputs for an example's rows alone.

    Args:
        trainer: without a callback.
        example_of: the example's id, given the tokens of a row or of a document; None
            for padding.
        together: rows of one example add up.
    """

    def __init__(self, trainer, example_of, together=True):
        self._model, self._example_of = trainer.model, example_of
        self._trainer, self._together = trainer, together
        self._call, self._alone = None, False
        self._backward = trainer.accelerator.backward
        trainer.accelerator.backward = self._before_backward
        trainer.model.register_forward_hook(self._note, with_kwargs=True)
        self.found = []  # (step, example, gradients by name)

    def _note(self, model, args, kwargs, output):
        if self._alone or not torch.is_grad_enabled():
            return None
        assert self._call is None
        self._call = args, dict(kwargs), dict(output)
        for name, value in self._call[2].items():  # the trainer may change its own
            if isinstance(value, torch.Tensor) and value.requires_grad:
                output[name] = value.clone()
        return output

    def _before_backward(self, loss, **kwargs):
        (args, named, output), self._call = self._call, None
        fields = {
            name: value
            for name, value in output.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        factors = torch.autograd.grad(
            loss, list(fields.values()), retain_graph=True, allow_unused=True
        )
        factors = {n: x for n, x in zip(fields, factors, strict=True) if x is not None}
        if "loss" in factors:  # which is made of the others
            factors = {"loss": factors["loss"]}
        tokens = args[0] if args else named["input_ids"]
        shares = []
        for example, part in self._parts(tokens, named.get("position_ids")):
            shares.append((example, self._share(args, named, factors, part)))
        step = self._trainer.state.global_step + 1
        for example, share in self._joined(shares):
            self.found.append((step, example, share))
        self._backward(loss, **kwargs)

    def _parts(self, tokens, positions):
        """The example of each part of a batch, and what takes that part of a tensor."""
        if positions is None or int((positions == 0).sum()) <= len(tokens):
            for row, own in enumerate(tokens):
                yield self._example_of(own), _rows(len(tokens), row)
            return
        starts = (positions[0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
            example = self._example_of(tokens[0, start:end])
            if example is not None:
                yield example, _document(tokens.shape[1], start, end)

    def _share(self, args, kwargs, factors, part):
        """The gradients of a part of the batch."""
        packed = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        own = {n: part(x) for n, x in kwargs.items() if n not in (*packed, "seq_idx")}
        self._alone = True
        output = self._model(*map(part, args), **own)
        self._alone = False
        parameters = dict(self._model.named_parameters())
        parameters = {n: x for n, x in parameters.items() if x.requires_grad}
        total = sum((part(x) * output[name]).sum() for name, x in factors.items())
        gradients = torch.autograd.grad(
            total, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, gradients, strict=True))

    def _joined(self, shares):
        """Shares of one example each."""
        if not self._together:
            return shares
        joined = {}
        for example, share in shares:
            before = joined.get(example)
            joined[example] = {
                name: x if before is None else before[name] + x
                for name, x in share.items()
            }
        return joined.items()


def _rows(count, row):
    """Return a function that takes one row from tensors of `count` rows."""

    def part(x):
        has_rows = isinstance(x, torch.Tensor) and x.dim() and len(x) == count
        return x[row : row + 1] if has_rows else x

    return part


def _document(length, start, end):
    """What takes a document of a row; fields of the output lack the last token."""

    def part(x):
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            return x
        return x[:, start : end if x.shape[1] == length else end - 1]

    return part


def assert_rows_are_shares(store, shares):
    """Rows times their weights are the sketches of the shares, in the same order."""
    rows = list(store.dataset)
    found = [(row["step"], row["example_id"]) for row in rows]
    assert found == [(step, example) for step, example, _ in shares.found]
    expected = [store.model_sketch.sketch(share).double() for *_, share in shares.found]
    smallest = 1e-6 * max(x.norm() for x in expected)
    assert smallest > 0
    for row, own in zip(rows, expected, strict=True):
        got = torch.tensor(row["sketch"]).double() * row["weight"]
        if own.norm() < smallest:  # of an answer that is neither good nor bad
            assert got.norm() < smallest
            continue
        assert (got - own).norm() <= 1e-4 * own.norm()
