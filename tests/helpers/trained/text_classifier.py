"""A classifier of pairs of texts, trained and recorded, with files to ask about it."""

import json

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.texts.minilm import embedded_model_path

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [
    {
        "premise": f"a {animal} sleeps on day {day}",
        "hypothesis": f"the {animal} is {word}",
        "label": label,
    }
    for day in range(2)
    for animal in ("cat", "dog", "horse")
    for label, word in enumerate(("asleep", "old", "awake"))
]


def trained_classifier(directory, out_size, **settings):
    """The output_dir of a classifier's run, with its training file and queries."""
    set_seed(0)
    config = BertConfig(**SMALL, intermediate_size=32, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    rows = Dataset.from_list(ROWS)
    data = rows.map(
        lambda row: tokenizer(row["premise"], row["hypothesis"]),
        remove_columns=["premise", "hypothesis"],
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            str(directory / "out"),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[GradientSketchCallback(out_size, **settings)],
    )
    trainer.train()
    trainer.save_model(directory / "model")
    (directory / "train.json").write_text("\n".join(map(json.dumps, ROWS)))
    (directory / "queries.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    return directory
