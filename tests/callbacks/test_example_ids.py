"""Which rows of the training set a batch is made of, in one process and in several."""

from itertools import product

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording.origins.ids import ExampleIds, check_stream
from tests.helpers.trained.training import RowNotes, tiny_dataset, tiny_trainer

SIZE = 64
SETTINGS = [
    {"drop_last": drop_last, "even_batches": even, "split_batches": split}
    for drop_last, even, split in product((False, True), repeat=3)
]


def loader_of(dataset, batch_size, processes, rank, drop_last=False, **settings):
    """The training DataLoader of one of several processes."""
    stream = isinstance(dataset, IterableDataset)
    generator = torch.Generator().manual_seed(3)
    sampler = None if stream else RandomSampler(dataset, generator=generator)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=settings.pop("num_workers", 0),
        in_order=settings.pop("in_order", True),
    )
    settings = {"dispatch_batches": False, "put_on_device": False, **settings}
    return prepare_data_loader(
        loader, num_processes=processes, process_index=rank, **settings
    )


def epoch_of(loader, ids, skipped=0):
    """Each batch's rows as they came, and as they were followed."""
    ids.resume(skipped, 1)
    ids.start_epoch()
    batches = skip_first_batches(loader, skipped) if skipped else loader
    return [(batch.tolist(), ids.next_batch()) for batch in batches]


FEW_ROWS = (1, 4, 5, 6, 11, 13)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "counts", [FEW_ROWS, pytest.param(range(1, 30), marks=pytest.mark.full)], ids=len
)
@pytest.mark.parametrize(
    "processes", [1, 2, 3, pytest.param(4, marks=pytest.mark.full)]
)
def test_every_row_has_its_turn_once(settings, processes, counts):
    """In every process a batch's ids are its rows, or None."""
    step = processes if settings["split_batches"] else 1
    for rows, size in product(counts, range(step, 4 * step, step)):
        turns = []
        for rank in range(processes):
            loader = loader_of(range(rows), size, processes, rank, **settings)
            ids = ExampleIds(loader, processes)
            for _ in range(2):
                epoch = epoch_of(loader, ids)
                turns.append([i for _, own in epoch for i in own if i is not None])
                for batch, own in epoch:
                    assert len(batch) == len(own)
                    assert all(
                        i in (row, None) for row, i in zip(batch, own, strict=True)
                    )
            ids.close()
        for epoch in (0, 1):
            seen = sorted(i for part in turns[epoch::2] for i in part)
            if settings["drop_last"]:
                assert len(set(seen)) == len(seen) > rows - size * processes
            else:
                assert seen == [*range(rows)]


@pytest.mark.parametrize("skipped", [0, 1, 3, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_are_followed_past_skipped_batches(rank, skipped):
    whole = loader_of(range(22), 2, 2, rank)
    expected = epoch_of(whole, ExampleIds(whole, 2))[skipped:]
    loader = loader_of(range(22), 2, 2, rank)
    assert epoch_of(loader, ExampleIds(loader, 2), skipped) == expected


def test_rows_are_followed_with_workers():
    loader = loader_of(range(22), 2, 2, 1, num_workers=2)
    for batch, own in epoch_of(loader, ExampleIds(loader, 2)):
        assert own in (batch, [None, None])


def test_batches_that_one_process_reads_for_all_are_refused():
    loader = loader_of(range(22), 2, 2, 0, dispatch_batches=True, put_on_device=True)
    message = r'got DataLoaderDispatcher in 2 .*Pass accelerator_config={"dispatch_bat'
    with pytest.raises(ValueError, match=message):
        ExampleIds(loader, 2)


def test_batches_out_of_order_are_refused():
    loader = loader_of(range(22), 2, 1, 0, num_workers=2, in_order=False)
    with pytest.raises(ValueError, match=r"dataloader_in_order=False\. Leave it out"):
        ExampleIds(loader)


class Counting(IterableDataset):
    def __iter__(self):
        return iter(range(22))


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_stream_that_processes_share_is_refused(dispatch):
    options = {"dispatch_batches": dispatch, "put_on_device": dispatch}
    loader = loader_of(Counting(), 2, 2, 0, **options)
    message = r"but 2 processes share one\. Pass .* at least 2 shards and accelera"
    with pytest.raises(ValueError, match=message):
        check_stream(loader, 2)


def test_a_stream_with_a_part_for_each_process_is_taken():
    stream = Dataset.from_dict({"x": [*range(22)]}).to_iterable_dataset(num_shards=2)
    parts = []
    for rank in (0, 1):
        loader = loader_of(stream, 2, 2, rank)
        check_stream(loader, 2)
        parts += [x for batch in loader for x in batch["x"].tolist()]
    assert sorted(parts) == [*range(22)]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dataloader_num_workers": 2},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
        *(
            pytest.param(arguments, marks=pytest.mark.full)
            for arguments in (
                {"gradient_accumulation_steps": 1},
                {"train_sampling_strategy": "sequential"},
                {"max_steps": 4},
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "remove_unused_columns", [True, pytest.param(False, marks=pytest.mark.full)]
)
def test_example_ids_are_row_numbers(tmp_path, arguments, remove_unused_columns):
    dataset, notes = tiny_dataset(), RowNotes()
    if not remove_unused_columns:
        dataset = dataset.remove_columns("text")
    trainer = tiny_trainer(
        tmp_path,
        notes,
        GradientSketchCallback(SIZE),
        dataset=dataset,
        remove_unused_columns=remove_unused_columns,
        **arguments,
    )
    trainer.train()
    rows = load_sketches(tmp_path).dataset.with_format("torch")[:]
    assert rows["example_id"].tolist() == notes.rows
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert type(sampler).__module__ != "hf_sketch.callbacks.recording.origins.ids"
    first_epoch = rows["example_id"][rows["epoch"] == 0]
    assert len(first_epoch.unique()) == len(first_epoch)


def test_duplicate_examples_have_rows_of_their_own(tmp_path):
    dataset = tiny_dataset().select([3] * 8)
    callback = GradientSketchCallback(SIZE)
    tiny_trainer(tmp_path, callback, dataset=dataset, max_steps=1).train()
    ids = load_sketches(tmp_path).dataset.with_format("torch")[:]["example_id"]
    assert sorted(ids.tolist()) == list(range(8))


@pytest.mark.parametrize("every_steps", [2, pytest.param(4, marks=pytest.mark.full)])
def test_only_every_nth_step_is_recorded_with_the_right_ids(tmp_path, every_steps):
    notes = RowNotes()
    callback = GradientSketchCallback(SIZE, every_steps=every_steps)
    tiny_trainer(tmp_path, notes, callback).train()
    store = load_sketches(tmp_path)
    wanted = [step for step in range(1, 7) if step % every_steps == 0]
    assert store.steps["step"][:] == wanted
    # Steps 1 to 6 take 8, 8, 6, 8, 8 and 6 examples of the two epochs.
    starts = {1: 0, 2: 8, 3: 16, 4: 22, 5: 30, 6: 38, 7: 44}
    expected = [
        row for step in wanted for row in notes.rows[starts[step] : starts[step + 1]]
    ]
    assert store.dataset["example_id"][:] == expected
