"""Rows of sentence-transformers' Trainer, which calls the model for each column."""

import importlib
import importlib.util

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.tiers import full

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sentence_transformers") is None,
        reason="needs the package sentence-transformers",
    ),
    pytest.mark.filterwarnings("ignore"),  # its own
]
WORDS = [*"abcdefgh"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROWS, SIZE = 10, 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny encoder without dropout, with its tokenizer."""
    directory = tmp_path_factory.mktemp("encoder")
    (directory / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(vocab_file=str(directory / "vocab.txt")).save_pretrained(
        directory
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(directory)
    return str(directory)


def texts(columns, **labels):
    """Texts of three to nine words in each column."""
    generator = torch.Generator().manual_seed(1)

    def text():
        length = int(torch.randint(3, 10, (1,), generator=generator))
        words = torch.randint(len(WORDS), (length,), generator=generator)
        return " ".join(WORDS[word] for word in words)

    names = ("anchor", "positive", "negative")[:columns]
    return Dataset.from_dict({n: [text() for _ in range(ROWS)] for n in names} | labels)


def trained(directory, saved, make_loss, data, watched=True, **arguments):
    """A Trainer after its training, by a loss that `make_loss(losses, model)` gives."""
    package = importlib.import_module("sentence_transformers")
    model = package.SentenceTransformer(saved, device="cpu")
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = package.SentenceTransformerTrainer(
        model,
        package.SentenceTransformerTrainingArguments(
            str(directory), **settings | arguments
        ),
        train_dataset=data,
        loss=make_loss(importlib.import_module(f"{package.__name__}.losses"), model),
        callbacks=[GradientSketchCallback(SIZE)] if watched else [],
    )
    trainer.train()
    return trainer


def cosine(losses, model):
    return losses.CosineSimilarityLoss(model)


def triplets(losses, model):
    return losses.TripletLoss(model, triplet_margin=50.0)


def nested(losses, model):
    return losses.MatryoshkaLoss(model, cosine(losses, model), [16, 8, 4])


def of_all_layers(losses, model):
    """Later calls take what the first one made of the layers, and run none of them."""
    return losses.AdaptiveLayerLoss(model, cosine(losses, model), n_layers_per_step=-1)


def of_all_layers_and_widths(losses, model):
    of_all = {"n_layers_per_step": -1, "n_dims_per_step": -1}
    return losses.Matryoshka2dLoss(model, cosine(losses, model), [16, 8], **of_all)


def closeness():
    return texts(2, label=[0.1 * i for i in range(ROWS)])


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        (cosine, 2),
        (triplets, 3),
        (nested, 2),
        (of_all_layers, 2),
        *full((of_all_layers_and_widths, 2)),
    ],
)
def test_a_dataset_row_has_one_row_of_all_its_texts(tmp_path, saved, loss, columns):
    data = closeness() if columns == 2 else texts(3)
    trainer = trained(tmp_path, saved, loss, data)
    store = load_sketches(tmp_path)
    assert sorted(store.dataset["example_id"][:]) == [*range(ROWS)]
    for row in store.dataset:
        trainer.model.zero_grad()
        inputs = trainer.data_collator([trainer.train_dataset[row["example_id"]]])
        trainer.compute_loss(trainer.model, inputs).backward()
        expected = store.model_sketch.sketch(
            {
                n: p.grad
                for n, p in trainer.model.named_parameters()
                if p.grad is not None
            }
        )
        assert (torch.tensor(row["sketch"]) - expected).norm() < 1e-4 * expected.norm()


def test_a_loss_that_keeps_what_the_model_returns_trains_as_without(tmp_path, saved):
    """MatryoshkaLoss puts a forward pass of its own on the model."""
    curves = []
    for watched in (False, True):
        trainer = trained(
            tmp_path / str(watched),
            saved,
            nested,
            closeness(),
            watched,
            learning_rate=0.01,
        )
        log = trainer.state.log_history
        curves.append([entry["loss"] for entry in log if "loss" in entry])
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == 3


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("MultipleNegativesRankingLoss", 2, None),
        ("CoSENTLoss", 2, [0.1 * i for i in range(ROWS)]),
        ("BatchAllTripletLoss", 1, [i % 2 for i in range(ROWS)]),
        ("OnlineContrastiveLoss", 2, [i % 2 for i in range(ROWS)]),
    ],
)
def test_losses_over_pairs_are_refused_by_name(tmp_path, saved, name, columns, labels):
    data = texts(columns, **({} if labels is None else {"label": labels}))
    with pytest.raises(ValueError, match=rf"but {name} compares them.*per_example="):
        trained(tmp_path, saved, lambda losses, m: getattr(losses, name)(m), data)
    assert not (tmp_path / "sketches").exists() or not load_sketches(tmp_path).dataset


def test_losses_over_pairs_are_refused_within_others(tmp_path, saved):
    def of_layers(losses, model):
        return losses.AdaptiveLayerLoss(
            model, losses.MultipleNegativesRankingLoss(model)
        )

    with pytest.raises(ValueError, match="but AdaptiveLayerLoss compares them"):
        trained(tmp_path, saved, of_layers, texts(2))


def test_losses_that_cache_gradients_are_refused(tmp_path, saved):
    def cached(losses, model):
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)

    name = "CachedMultipleNegativesRankingLoss"
    with pytest.raises(ValueError, match=rf"but {name} compares them.*per_example="):
        trained(tmp_path, saved, cached, texts(2))
