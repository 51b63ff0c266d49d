"""Order and batches, on data without pictures where pictures do not matter."""

import json
from itertools import islice

import datasets
import pytest
from PIL import Image

from diffusers_dim import DIMImageProcessor
from diffusers_dim.data import (
    BatchOrder,
    SkippedSamples,
    TrainingLoader,
    UnreadableSampleError,
    find_bucket,
    load_training_data,
    records,
)


class Numbers:
    """Samples that are numbers, of given sizes and lengths, some of them unreadable."""

    def __init__(self, count, sizes=((64, 64),), broken=(), lengths=None):
        self.count, self.sizes, self.broken, self.lengths = count, sizes, broken, lengths

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableSampleError(str(index), "target: broken")
        return {"id": str(index), "number": index}

    def size(self, index):
        return self.sizes[index % len(self.sizes)]

    def length(self, index):
        return self.lengths[index]


SETTINGS = {"resolution": 64, "vae_scale_factor": 8, "seed": 3}
MIXED = {"sizes": [(64, 64), (48, 96), (64, 60)]}


def numbers(batch):
    return [sample["number"] for sample in batch.samples]


def take(loader, count, start=0):
    return list(islice(loader.batches(start), count))


@pytest.mark.parametrize("options", [{}, {"aspect_ratio_bucketing": True}, {"group_by_length": True}])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_one_order(options, processes):
    data = Numbers(60, **MIXED, lengths=[7 * i % 60 for i in range(60)])
    whole = take(TrainingLoader(data, 6, **SETTINGS, **options), 20)
    shares = [
        take(
            TrainingLoader(data, 6 // processes, **SETTINGS, **options, num_processes=processes, process_index=index),
            20,
        )
        for index in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert numbers(batch) == [number for part in parts for number in numbers(part)]
        assert batch.positions == [position for part in parts for position in part.positions]
        assert all((part.height, part.width) == (batch.height, batch.width) for part in parts)


@pytest.mark.parametrize("start", [0, 1, 6, 7, 23])
def test_any_start_is_a_place_in_the_unbroken_order(start):
    data = Numbers(26, **MIXED)
    loader = TrainingLoader(data, 4, **SETTINGS, aspect_ratio_bucketing=True)
    assert take(loader, 10, start) == take(loader, 40)[start : start + 10]


def test_positions_run_on_over_epochs():
    loader = TrainingLoader(Numbers(10), 4, **SETTINGS)
    batches = take(loader, 5)
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1, 2]
    assert [position for batch in batches for position in batch.positions] == list(range(20))


def test_epochs_show_each_sample_once_in_new_orders():
    loader = TrainingLoader(Numbers(12), 4, **SETTINGS)
    first, second = (sum(map(numbers, take(loader, 3, start)), []) for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    other = sum(map(numbers, take(TrainingLoader(Numbers(12), 4, **SETTINGS | {"seed": 4}), 3)), [])
    assert other != first


def test_batches_are_of_one_size():
    data = Numbers(60, **MIXED)
    loader = TrainingLoader(data, 4, **SETTINGS, aspect_ratio_bucketing=True)
    seen = set()
    for batch in take(loader, loader.batches_per_epoch):
        buckets = {find_bucket(data.size(number), 64, 8, True) for number in numbers(batch)}
        assert buckets == {(batch.height, batch.width)}
        seen |= buckets
    assert len(seen) == 2  # 64x60 is square enough


def test_what_is_left_over_differs_between_epochs():
    order = BatchOrder([(64, 64)] * 7, 4)
    assert (order.batches_per_epoch, order.left_over) == (1, 3)
    assert len({tuple(sorted(order.epoch(epoch)[0][1])) for epoch in range(6)}) > 1


def test_grouping_by_length_leaves_less_padding():
    lengths = [(37 * i) % 400 for i in range(400)]
    padding = []
    for options in ({}, {"group_by_length": True}):
        loader = TrainingLoader(Numbers(400, lengths=lengths), 8, **SETTINGS, **options)
        batches = [[lengths[number] for number in numbers(batch)] for batch in take(loader, loader.batches_per_epoch)]
        assert sorted(sum(batches, [])) == sorted(lengths)
        padding.append(sum(max(batch) * len(batch) - sum(batch) for batch in batches))
    assert padding[1] < 0.1 * padding[0]


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_samples_are_left_out_listed_once_and_not_replaced(tmp_path, workers):
    data, skipped = Numbers(12, broken=(2, 5)), SkippedSamples(tmp_path)
    loader = TrainingLoader(data, 4, **SETTINGS, skipped=skipped, num_workers=workers)
    whole = take(TrainingLoader(Numbers(12), 4, **SETTINGS), 9)
    for batch, complete in zip(take(loader, 9), whole, strict=True):
        kept = [(n, p) for n, p in zip(numbers(complete), complete.positions) if n not in (2, 5)]
        assert list(zip(numbers(batch), batch.positions)) == kept
    assert len(skipped) == 2
    lines = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["2", "5"]
    assert len(SkippedSamples(tmp_path)) == 2  # a resumed run's


def test_sample_is_listed_once_whichever_processes_come_upon_it(tmp_path):
    data = Numbers(8, broken=(5,))
    for index in (0, 1):
        skipped = SkippedSamples(tmp_path, index)
        loader = TrainingLoader(data, 2, **SETTINGS, num_processes=2, process_index=index, skipped=skipped)
        epochs = [batch.epoch for batch in take(loader, 40) if len(batch.samples) < 2]
        assert len(epochs) > 2  # in each process's share now and then
        assert len(skipped) == 1
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl")) == 1


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    lines = tmp_path / "skipped-0.jsonl"
    lines.write_text('{"id": "a", "reason": "target: broken"}\n{"id": "b", "rea')
    skipped = SkippedSamples(tmp_path)
    assert len(skipped) == 1
    skipped.add(UnreadableSampleError("b", "target: broken"))
    assert [json.loads(line)["id"] for line in lines.read_text().splitlines()] == ["a", "b"]


def test_share_of_unreadable_samples_is_empty_and_the_others_go_on():
    shares = []
    for index in (0, 1):
        loader = TrainingLoader(Numbers(2, broken=(0,)), 1, **SETTINGS, num_processes=2, process_index=index)
        shares.append(take(loader, 8))
    for one, other in zip(*shares, strict=True):
        assert numbers(one) + numbers(other) == [1]
        assert sorted([one.positions, other.positions], key=len)[0] == []
        assert (one.height, one.width) == (other.height, other.width) == (64, 64)


def test_samples_without_a_size_are_in_no_batch_and_listed_by_one_process(tmp_path):
    class Unsized(Numbers):
        def size(self, index):
            if index in self.broken:
                raise UnreadableSampleError(str(index), "target: no such file")
            return super().size(index)

    for index in (1, 0):
        loader = TrainingLoader(
            Unsized(7, broken=(3,)),
            1,
            **SETTINGS,
            aspect_ratio_bucketing=True,
            num_processes=2,
            process_index=index,
            skipped=SkippedSamples(tmp_path, index),
        )
        assert loader.batches_per_epoch == 3
        assert all(batch.samples for batch in take(loader, 9))
        assert (tmp_path / "skipped-0.jsonl").exists() == (index == 0)
    assert not (tmp_path / "skipped-1.jsonl").exists()


@pytest.mark.parametrize("size", [(64, 64), (100, 30), (7, 300), (4000, 3000)])
@pytest.mark.parametrize("resolution", [64, 1024])
def test_bucket_is_the_size_that_the_pipelines_choose(size, resolution):
    height, width = size
    expected = DIMImageProcessor(32, resolution).get_default_height_width(Image.new("1", (width, height)))
    assert find_bucket(size, resolution, 32, True) == expected
    assert find_bucket(size, resolution, 32, False) == (resolution, resolution)


def test_data_without_one_readable_picture_end_in_an_error():
    loader = TrainingLoader(Numbers(4, broken=range(4)), 2, **SETTINGS)
    with pytest.raises(ValueError, match="None of the last 101 batches .* could be read; of sample ., target: broken"):
        take(loader, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 13}, "There is no batch of 13 samples over all processes: of 12 samples at most 12"),
        ({"batch_size": 5, "num_processes": 3}, "Lower --train_batch_size or the number of processes"),
        ({"batch_size": 0}, "batch size has to be at least 1, but is 0"),
        ({"resolution": 60}, "multiple of 8, but is 60"),
    ],
)
def test_settings_without_a_full_batch_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingLoader(Numbers(12), **{"batch_size": 4, **SETTINGS, **options})


@pytest.fixture
def stream(tmp_path):
    """Fourteen pictures of two shapes in three shards, without ids; "b" is broken."""
    columns = {"image": [], "text": []}
    for name in "abcdefghijklmn":
        Image.new("RGB", (64, 64) if name < "h" else (96, 48)).save(tmp_path / f"{name}.png")
        columns["image"].append((tmp_path / f"{name}.png").read_bytes()[: 60 if name == "b" else None])
        columns["text"].append(name)
    table = datasets.Dataset.from_dict(columns)
    for number in range(3):
        table.shard(3, number).to_parquet(tmp_path / f"train-{number}.parquet")
    return load_training_data("t2i", dataset_name=str(tmp_path), streaming=True)


def prompts(batches):
    return [[sample["prompt"] for sample in batch.samples] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bucketing", [False, True])
def test_stream_is_shared_and_resumed(stream, bucketing, workers):
    settings = {**SETTINGS, "aspect_ratio_bucketing": bucketing, "num_workers": workers}
    whole = take(TrainingLoader(stream, 4, **settings), 9)
    shares = [take(TrainingLoader(stream, 2, **settings, num_processes=2, process_index=index), 9) for index in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert prompts([batch])[0] == sum(prompts(parts), [])
        assert batch.positions == sum((part.positions for part in parts), [])
    assert prompts(take(TrainingLoader(stream, 4, **settings), 4, start=5)) == prompts(whole)[5:]
    assert {batch.epoch for batch in whole} >= {0, 1, 2}
    assert all(set(batch.positions) <= set(range(4 * n, 4 * n + 4)) for n, batch in enumerate(whole))
    first, second = (sum(prompts(batch for batch in whole if batch.epoch == epoch), []) for epoch in (0, 1))
    assert first != second
    wide = [{prompt >= "h" for prompt in names} for names in prompts(whole)]
    assert all(len(shapes) == 1 for shapes in wide) == bucketing


def test_stream_is_new_every_epoch_in_shards_and_rows(stream, monkeypatch):
    monkeypatch.setattr(records, "SHUFFLE_BUFFER", 3)
    orders = [[row["text"] for _, row in stream.shuffled(seed, epoch)] for seed in (0, 1) for epoch in range(5)]
    assert all(sorted(order) == list("abcdefghijklmn") for order in orders)
    assert len(set(map(tuple, orders))) == 10
    assert {"abcde".find(order[0]) < 0 for order in orders} == {True, False}  # now and then not from the first shard
    assert [row["text"] for _, row in stream.shuffled(1, 0)] == orders[5]


@pytest.mark.parametrize("bucketing", [False, True])
def test_broken_picture_of_a_stream_is_listed_once(stream, tmp_path, bucketing):
    skipped = SkippedSamples(tmp_path / "run")
    loader = TrainingLoader(stream, 2, **SETTINGS, aspect_ratio_bucketing=bucketing, skipped=skipped)
    batches = take(loader, 30)
    assert batches[-1].epoch >= 4
    assert "b" not in sum(prompts(batches), [])
    (line,) = (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "0-1"  # the first shard's second row


def test_stream_without_a_full_batch_is_refused(stream):
    with pytest.raises(ValueError, match="no 20 readable samples of one size"):
        take(TrainingLoader(stream, 20, **SETTINGS), 1)
    with pytest.raises(ValueError, match="cannot be grouped by length"):
        TrainingLoader(stream, 2, **SETTINGS, group_by_length=True)
