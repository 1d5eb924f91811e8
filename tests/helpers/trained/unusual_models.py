"""Models whose parameters are not used as their modules promise, and a batch."""

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

LENGTH, WIDTH, WORDS = 6, 8, 32


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (4, LENGTH), generator=generator)
    labels = ids.clone()
    labels[1, 3:] = labels[2, 5:] = -100
    return {"input_ids": ids, "labels": labels}


class Model(nn.Module):
    """Predicts the next word from a sum of looked up rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def hidden(self, input_ids):
        return self.mix(self.words(input_ids)).tanh().cumsum(1)

    def forward(self, input_ids, labels):
        logits = self.head(self.hidden(input_ids))
        return {"loss": self.loss(logits, labels), "logits": logits}

    def loss(self, logits, labels):
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Overwritten(Model):
    """Writes into what it has looked up, and its head is tied to the table."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.words.weight

    def hidden(self, input_ids):
        looked_up = self.words(input_ids)
        looked_up[:, 0] = 1.0
        looked_up.mul_(0.5)
        return self.mix(looked_up).tanh().cumsum(1)


class Repeated(Model):
    """Repeats a table of places, which went through a Linear, over the batch."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(LENGTH, WIDTH)

    def hidden(self, input_ids):
        table = self.mix(self.places.weight.unsqueeze(0))
        return (self.mix(self.words(input_ids)) + table.repeat(4, 1, 1)[:1]).tanh()


class Elsewhere(Model):
    """Uses the weights of modules that it does not call."""

    def hidden(self, input_ids):
        looked_up = functional.embedding(input_ids, self.words.weight)
        return (looked_up @ self.mix.weight.T + self.mix.bias).tanh().cumsum(1)


class Sorted(Model):
    """Calls a module on the tokens in another order, as mixtures of experts do."""

    def hidden(self, input_ids):
        looked_up = self.words(input_ids).flatten(0, 1)
        order = looked_up[:, 0].argsort()
        mixed = self.mix(looked_up[order])[order.argsort()]
        return mixed.unflatten(0, input_ids.shape).tanh().cumsum(1)


class TimeFirst(Model):
    """Computes with the tokens along the first dimension."""

    def hidden(self, input_ids):
        return self.mix(self.words(input_ids.T)).tanh().cumsum(0).transpose(0, 1)


class Masked(Model):
    """Trains some rows of its table: a hook takes the gradients of the others."""

    def __init__(self):
        super().__init__()
        kept = (torch.arange(WORDS) % 2).unsqueeze(1)
        self.words.weight.register_hook(lambda gradient: gradient * kept)


class Bypassed(Model):
    """Calls a module in evaluation mode alone, and else takes its weight."""

    def hidden(self, input_ids):
        looked_up = self.words(input_ids)
        if self.training:
            mixed = functional.linear(looked_up, self.mix.weight, self.mix.bias)
        else:
            mixed = self.mix(looked_up)
        return mixed.tanh().cumsum(1)


class Gated(Sorted):
    """Adds what is multiplied by a gate, which is closed at first."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def hidden(self, input_ids):
        return self.words(input_ids) + self.gate * super().hidden(input_ids)


class Noisy(nn.Module):
    """Multiplies by a matrix and random numbers, of which a closed gate shows none."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        noise = torch.rand_like(x) if self.training else 0.5
        return x + (x @ self.mix) * noise * self.gate


class LossAlone(Model):
    """Returns nothing but its loss."""

    def forward(self, input_ids, labels):
        return {"loss": super().forward(input_ids, labels)["loss"]}


class SumOfLosses(Model):
    """Adds up the losses of all tokens."""

    def loss(self, logits, labels):
        labels = labels.clamp(min=0).flatten()
        return functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


class Within(nn.Module):
    """Holds a model that computes the loss."""

    def __init__(self):
        super().__init__()
        self.inner = Overwritten()

    def forward(self, input_ids, labels):
        return self.inner(input_ids=input_ids, labels=labels)


class Fused(Model):
    """Returns log-probabilities, or its loss alone, and never calls its head."""

    base_model_prefix = "body"

    def __init__(self, config, *, alone):
        super().__init__()
        self.config, self.alone = LlamaConfig(**config), alone
        self.body = Body(self.words, self.mix)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels):
        hidden = self.body(input_ids)["last_hidden_state"][:, :-1]
        scores = hidden @ self.head.weight.T
        scores = scores * getattr(self.config, "logit_scale", 1.0)
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            scores = cap * (scores / cap).tanh()
        labels = labels[:, 1:]
        chosen = labels.clamp(min=0).unsqueeze(-1)
        log_probs = scores.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        log_probs = log_probs.masked_fill(labels == -100, 0.0)
        loss = -log_probs.sum() / (labels != -100).sum()
        return {"loss": loss} | ({} if self.alone else {"log_probs": log_probs})


class Body(nn.Module):
    """The model without its head."""

    def __init__(self, words, mix):
        super().__init__()
        self.words, self.mix = words, mix

    def forward(self, input_ids):
        hidden = self.mix(self.words(input_ids)).tanh().cumsum(1)
        return {"last_hidden_state": hidden}


class TiedWithin(Model):
    """Holds the bias of a module within it, as BERT's head does."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.mix.bias = self.bias
