"""Layers of torch.nn, used as people use them, beside single-example passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, rnn

from hf_sketch import ModelSketch
from hf_sketch.examples.sketcher import ExampleSketcher
from tests.helpers.tiers import full

WIDTH = 6


class Net(nn.Module):
    """A module between two linear layers, and the way in which it is used."""

    main_input_name = "x"

    def __init__(self, part, use):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.part = part
        self.use = use
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, labels):
        y = self.use(self.part, self.inner(x).tanh())
        y = y.flatten(2).mean(1) if y.dim() > 2 else y
        logits = self.head(functional.pad(y, (0, WIDTH))[:, :WIDTH])
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Bare(nn.Module):
    """Parameters that others use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def called(module, x):
    return module(x)


def first_output(module, x):
    return module(x)[0]


def steps_first(module, x):
    return module(x.transpose(0, 1))[0].transpose(0, 1)


def last_state(module, x):
    return module(x)[1].transpose(0, 1)


def channels(module, x):
    return module(x.transpose(1, 2)).transpose(1, 2)


def image(module, x):
    return module(x.unsqueeze(1)).flatten(2)


def attended(module, x):
    return module(x, x, x)[0]


def attended_steps_first(module, x):
    x = x.transpose(0, 1)
    return module(x, x, x)[0].transpose(0, 1)


def ids(x):
    return (x * 4).long().abs()[..., 0] % 9


def bag_with_offsets(module, x):
    offsets = torch.arange(len(x)) * x.shape[1]
    return x + module(ids(x).flatten(), offsets).unsqueeze(1)


def of_packed(module, x):
    lengths = 2 + (x[:, 0, 0] > 0).long()
    packed = rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    padded = rnn.pad_packed_sequence(module(packed)[0], True, total_length=x.shape[1])
    return padded[0]


def of_chosen_tokens(module, x):
    chosen = x[..., 0] > 0
    return x.clone().index_put_((chosen,), module(x[chosen]))


def of_chosen_examples(module, x):
    chosen = x[:, 0, 0] > 0
    return x.clone().index_put_((chosen,), module(x[chosen]))


def in_order(module, x):
    order = x[:, 0, 0].argsort()
    return module(x[order])[order.argsort()]


def recurrent(kind, **settings):
    return lambda: kind(WIDTH, WIDTH, **settings)


def attention(**settings):
    return lambda: nn.MultiheadAttention(WIDTH, 2, **settings)


def layer(kind, **settings):
    return lambda: kind(WIDTH, 2, 8, 0.0, **settings)


def normed(norm, **settings):
    return lambda: norm(linear(), **settings)


def convolution(kind=nn.Conv1d, **settings):
    return lambda: kind(WIDTH, WIDTH, 3, padding=1, **settings)


FIRST = {"batch_first": True}
PLAIN = {
    "gru states": (recurrent(nn.GRU, num_layers=2, **FIRST), last_state),
    "lstm, steps first": (recurrent(nn.LSTM), steps_first),
    "attention, steps first": (attention(), attended_steps_first),
    "weight norm": (normed(parametrizations.weight_norm), called),
    "orthogonal": (normed(parametrizations.orthogonal), called),
    "functional": (linear, lambda m, x: functional.linear(x, m.weight, m.bias)),
    "bare": (Bare, lambda m, x: x @ m.weight + m.bias),
    "dimension 1": (linear, lambda m, x: m(x.transpose(0, 1)).transpose(0, 1)),
    "flipped": (linear, lambda m, x: m(x.flip(0)).flip(0)),
    "chunks": (linear, lambda m, x: torch.cat([m(part) for part in x.chunk(2)])),
    "chosen examples": (linear, of_chosen_examples),
    "sorted": (linear, in_order),
}
FULL = {
    "linear": (linear, called),
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda m, x: m(x, x)),
    "rnn": (recurrent(nn.RNN, **FIRST), first_output),
    "rnn, steps first": (recurrent(nn.RNN), steps_first),
    "rnn states": (recurrent(nn.RNN, **FIRST), last_state),
    "gru": (recurrent(nn.GRU, **FIRST), first_output),
    "gru, steps first": (recurrent(nn.GRU), steps_first),
    "lstm": (recurrent(nn.LSTM, **FIRST), first_output),
    "lstm, both ways": (
        lambda: nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, **FIRST),
        first_output,
    ),
    "lstm states": (
        recurrent(nn.LSTM, **FIRST),
        lambda m, x: m(x)[1][0].transpose(0, 1),
    ),
    "lstm of packed": (recurrent(nn.LSTM, **FIRST), of_packed),
    "gru cell": (
        recurrent(nn.GRUCell),
        lambda m, x: m(x[:, 1], m(x[:, 0])).unsqueeze(1),
    ),
    "lstm cell": (recurrent(nn.LSTMCell), lambda m, x: m(x[:, 1])[0].unsqueeze(1)),
    "attention": (attention(**FIRST), attended),
    "attention with more": (attention(add_bias_kv=True, **FIRST), attended),
    "encoder": (layer(nn.TransformerEncoderLayer, **FIRST), called),
    "decoder": (layer(nn.TransformerDecoderLayer, **FIRST), lambda m, x: m(x, x)),
    "spectral norm": (normed(parametrizations.spectral_norm), called),
    "weight norm of a convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(WIDTH, WIDTH, 1), dim=2),
        channels,
    ),
    "both": (linear, lambda m, x: m(x) + functional.linear(x, m.weight)),
    "convolution": (convolution(), channels),
    "groups": (convolution(groups=2), channels),
    "circular": (convolution(padding_mode="circular"), channels),
    "transposed": (convolution(nn.ConvTranspose1d), channels),
    "of images": (lambda: nn.Conv2d(1, 2, 3), image),
    "transposed, of images": (lambda: nn.ConvTranspose2d(1, 2, 3), image),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), channels),
    "instance norm": (lambda: nn.InstanceNorm1d(WIDTH, affine=True), channels),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), called),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), called),
    "slopes": (lambda: nn.PReLU(WIDTH), channels),
    "bag": (
        lambda: nn.EmbeddingBag(9, WIDTH),
        lambda m, x: x + m(ids(x)).unsqueeze(1),
    ),
    "bag with offsets": (
        lambda: nn.EmbeddingBag(9, WIDTH, mode="sum"),
        bag_with_offsets,
    ),
    "positions": (
        lambda: nn.Embedding(9, WIDTH),
        lambda m, x: x + m(torch.arange(x.shape[1])),
    ),
    "chosen tokens": (linear, of_chosen_tokens),
    "flattened": (linear, lambda m, x: m(x.flatten(0, 1)).view_as(x)),
    "doubled": (linear, lambda m, x: m(torch.cat([x, 2 * x])).chunk(2)[1]),
    "interleaved": (linear, lambda m, x: m(x.repeat_interleave(2, 0))[::2]),
}
CASES = {**PLAIN, **FULL}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*PLAIN, *full(*FULL)])
def test_rows_are_those_of_single_examples(name):
    torch.manual_seed(0)
    make, use = CASES[name]
    model = Net(make(), use).double()
    if name == "spectral norm":  # whose training mode changes the model
        model.eval()
    x, labels = torch.randn(4, 5, WIDTH).double(), torch.tensor([0, 1, 2, 1])
    sketch = ModelSketch.from_model(model, 32, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(x=x, labels=labels)["loss"].backward()
        rows = sketcher.take().rows
    parameters = sketch.parameters_of(model)
    for index, row in enumerate(rows):
        model.zero_grad()
        alone = slice(index, index + 1)
        model(x=x[alone], labels=labels[alone])["loss"].backward()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        torch.testing.assert_close(row, sketch.sketch(gradients))
