# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Batches of samples for one of several processes, from any place on, with unreadable samples left out."""

import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm.auto import tqdm

from .buckets import BatchOrder, find_bucket
from .records import StreamingDataset, UnreadableSampleError


logger = logging.getLogger(__name__)

SIZE_READERS = 16  # threads that read headers, which mostly wait
SIZES_AT_ONCE = 256


@dataclass(frozen=True)
class TrainingBatch:
    """
    One process's share of a global micro-batch.

    Args:
        samples (`list[dict]`): Those that could be read, perhaps none.
        positions (`list[int]`): Each one's number in the run's order, whatever the number of processes.
        height (`int`): In pixels, of all samples of the global micro-batch.
        width (`int`): In pixels.
        epoch (`int`): The pass over the data, from 0.
    """

    samples: list[dict[str, Any]]
    positions: list[int]
    height: int
    width: int
    epoch: int


class SkippedSamples:
    r"""
    Lists samples that could not be read: a line with `id` and `reason` in `skipped-{process_index}.jsonl`. A sample is
    listed once, whichever process comes upon it in whichever epoch, as long as all see the run's folder.

    Args:
        output_dir (`str` or `Path`): The run's folder, perhaps of a run that is resumed.
        process_index (`int`, defaults to 0): Each process has a file of its own.
    """

    def __init__(self, output_dir: str | Path, process_index: int = 0):
        self.path = Path(output_dir) / f"skipped-{process_index}.jsonl"
        self._lock = Lock()
        self._listed: set[str] = set()
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a killed run left half a line
            self.path.write_bytes(whole)

    def __len__(self) -> int:
        """Samples that any process has listed."""
        return len(self.ids)

    @property
    def ids(self) -> set[str]:
        """Theirs."""
        files = [path.read_bytes() for path in self.path.parent.glob("skipped-*.jsonl")]
        lines = [line for file in files for line in file.splitlines(keepends=True)]
        return {json.loads(line)["id"] for line in lines if line.endswith(b"\n")}

    def add(self, error: UnreadableSampleError) -> None:
        """Lists a sample, unless it is listed."""
        with self._lock:
            if error.id not in self._listed:  # else it is met again in a later epoch, and no file need be read
                self._listed = self.ids
            if error.id in self._listed:
                return
            self._listed.add(error.id)
            logger.warning("Skipped sample %s, %s", error.id, error.reason)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as lines:
                lines.write(json.dumps({"id": error.id, "reason": error.reason}) + "\n")


class TrainingLoader:
    r"""
    Batches without end, each process its own share of global micro-batches of `batch_size * num_processes` samples of
    one size. The global order does not depend on how many processes share it.

    A streaming dataset is read by every process from its beginning, undecoded, and decoded where it is a process's
    own, so that all agree on the order without a word; a start other than 0 reads past what comes before. Of other
    data nothing is read but what a process needs, though with `aspect_ratio_bucketing` each reads all headers first.

    Args:
        dataset ([`TrainingDataset`], [`PrecomputedDataset`] or [`StreamingDataset`]):
            The samples.
        batch_size (`int`):
            Samples a process.
        resolution (`int`):
            Side in pixels of the square that samples are trained at, or whose area they are trained at.
        vae_scale_factor (`int`):
            Of whose multiples sizes are.
        aspect_ratio_bucketing (`bool`, defaults to `False`):
            Whether pictures keep their shapes, in buckets.
        group_by_length (`bool`, defaults to `False`):
            Whether to batch prompts of like length; not for streaming data.
        seed (`int`, defaults to 0):
            Of the order.
        num_processes (`int`, defaults to 1):
            How many share the batches.
        process_index (`int`, defaults to 0):
            Whose share this is.
        num_workers (`int`, defaults to 0):
            Threads that read ahead, two batches each.
        skipped ([`SkippedSamples`], *optional*):
            Receives the samples that cannot be read.

    Attributes:
        batches_per_epoch (`int` or `None`): Global micro-batches a pass over the data; `None` for streaming data.

    Raises:
        ValueError: If the data make no full batch, or `resolution` is no multiple of `vae_scale_factor`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        resolution: int,
        vae_scale_factor: int,
        aspect_ratio_bucketing: bool = False,
        group_by_length: bool = False,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
        skipped: SkippedSamples | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"The batch size has to be at least 1, but is {batch_size}.")
        if resolution < 1 or resolution % vae_scale_factor:
            raise ValueError(f"The resolution has to be a multiple of {vae_scale_factor}, but is {resolution}.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.resolution = resolution
        self.vae_scale_factor = vae_scale_factor
        self.aspect_ratio_bucketing = aspect_ratio_bucketing
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index
        self.num_workers = num_workers
        self.skipped = skipped
        self.streaming = isinstance(dataset, StreamingDataset)
        self.batches_per_epoch = None
        if self.streaming:
            if group_by_length:
                raise ValueError("Streaming data cannot be grouped by length, which needs all lengths first.")
            return
        lengths = [dataset.length(index) for index in range(len(dataset))] if group_by_length else None
        self.order = BatchOrder(self._find_buckets(), batch_size * num_processes, seed, lengths)
        self.batches_per_epoch = self.order.batches_per_epoch
        logger.info(
            "%d samples of %d sizes make %d batches of %d an epoch; %d are left over each time.",
            len(dataset),
            len(self.order.members),
            self.batches_per_epoch,
            self.order.global_size,
            self.order.left_over,
        )

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """
        This process's share of the global micro-batches from number `start` on, without end.

        Raises:
            ValueError: If a stream holds no full batch, or for a whole epoch nothing of the share can be read.
        """
        shares = self._streamed(start) if self.streaming else self._ordered(start)
        empty = 0
        for batch, errors in self._filled(shares):
            for error in errors:
                self._skip(error)
            empty = 0 if batch.samples else empty + 1
            if empty > max(self.batches_per_epoch or 0, 100):
                raise ValueError(
                    f"None of the last {empty} batches of process {self.process_index} could be read; of sample"
                    f" {errors[-1].id}, {errors[-1].reason}."
                )
            yield batch

    def _skip(self, error: UnreadableSampleError) -> None:
        if self.skipped is not None:
            self.skipped.add(error)

    def _find_buckets(self) -> list[tuple[int, int] | None]:
        """Each sample's size in training; headers are read only where pictures keep their shapes."""
        samples = range(len(self.dataset))
        if not self.aspect_ratio_bucketing:
            return [(self.resolution, self.resolution)] * len(samples)
        parts = [samples[first : first + SIZES_AT_ONCE] for first in samples[::SIZES_AT_ONCE]]
        buckets: list[tuple[int, int] | None] = []
        with ThreadPoolExecutor(SIZE_READERS) as pool:
            bar = tqdm(total=len(samples), desc="Sizes of pictures", delay=5, disable=self.process_index > 0)
            for part in pool.map(lambda part: [self._bucket_of(self.dataset.size, index) for index in part], parts):
                buckets += [self._kept(bucket) for bucket in part]
                bar.update(len(part))
            bar.close()
        return buckets

    def _bucket_of(self, size: Any, *args: Any) -> tuple[int, int] | UnreadableSampleError:
        try:
            return find_bucket(size(*args), self.resolution, self.vae_scale_factor, self.aspect_ratio_bucketing)
        except UnreadableSampleError as error:
            return error

    def _kept(self, bucket: tuple[int, int] | UnreadableSampleError) -> tuple[int, int] | None:
        """The bucket; of a sample without, which every process comes upon, the first process takes note."""
        if isinstance(bucket, UnreadableSampleError):
            if self.process_index == 0:
                self._skip(bucket)
            return None
        return bucket

    @property
    def _own(self) -> slice:
        first = self.process_index * self.batch_size
        return slice(first, first + self.batch_size)

    def _ordered(self, start: int) -> Iterator[tuple[TrainingBatch, list[Any]]]:
        """Empty batches and the indices that are to fill them."""
        first_epoch, done = divmod(start, self.batches_per_epoch)
        for epoch in count(first_epoch):
            for number, (bucket, indices) in enumerate(self.order.epoch(epoch)[done:], start=done):
                first = (epoch * self.batches_per_epoch + number) * len(indices)
                positions = list(range(first, first + len(indices)))
                yield TrainingBatch([], positions[self._own], *bucket, epoch), indices[self._own]
            done = 0

    def _streamed(self, start: int) -> Iterator[tuple[TrainingBatch, list[Any]]]:
        """Empty batches and the numbered rows that are to fill them."""
        size, own, batches = self.batch_size * self.num_processes, self._own, 0
        for epoch in count():
            waiting: dict[tuple[int, int], list[Any]] = {}
            before = batches
            for number, row in self.dataset.shuffled(self.seed, epoch):
                bucket: tuple[int, int] | None = (self.resolution, self.resolution)
                if self.aspect_ratio_bucketing:
                    bucket = self._kept(self._bucket_of(self.dataset.reader.size, row, number))
                if bucket is None:
                    continue
                rows = waiting.setdefault(bucket, [])
                # Other processes' rows are counted, not kept.
                rows.append((number, row) if own.start <= len(rows) < own.stop else None)
                if len(rows) == size:
                    if batches >= start:
                        positions = list(range(batches * size, (batches + 1) * size))
                        yield TrainingBatch([], positions[own], *bucket, epoch), rows[own]
                    batches += 1
                    del waiting[bucket]
            if batches == before:
                raise ValueError(
                    f"The stream has no {size} readable samples of one size, which a batch of {self.batch_size} on"
                    f" each of {self.num_processes} processes needs: lower --train_batch_size or the number of"
                    " processes, or turn --aspect_ratio_bucketing off."
                )

    def _read(self, share: tuple[TrainingBatch, list[Any]]) -> tuple[TrainingBatch, list[UnreadableSampleError]]:
        batch, wanted = share
        samples, positions, errors = [], [], []
        for position, key in zip(batch.positions, wanted, strict=True):
            try:
                samples.append(self.dataset.reader.sample(key[1], key[0]) if self.streaming else self.dataset[key])
                positions.append(position)
            except UnreadableSampleError as error:
                errors.append(error)
        return TrainingBatch(samples, positions, batch.height, batch.width, batch.epoch), errors

    def _filled(
        self, shares: Iterator[tuple[TrainingBatch, list[Any]]]
    ) -> Iterator[tuple[TrainingBatch, list[UnreadableSampleError]]]:
        """Batches in order with what could not be read of them, by threads where there are workers."""
        if self.num_workers == 0:
            yield from map(self._read, shares)
            return
        # One thread takes shares in order, which of a stream means to read it, while others decode.
        taker, readers = ThreadPoolExecutor(1), ThreadPoolExecutor(self.num_workers)

        def submit() -> Future[tuple[TrainingBatch, list[UnreadableSampleError]]]:
            share = taker.submit(next, shares)
            return readers.submit(lambda: self._read(share.result()))

        try:
            pending = deque(submit() for _ in range(2 * self.num_workers))
            while True:
                yield pending.popleft().result()
                pending.append(submit())
        finally:
            taker.shutdown(wait=False, cancel_futures=True)
            readers.shutdown(wait=False, cancel_futures=True)
