from ..files import read_jsonl
from .buckets import BatchOrder, find_bucket
from .loader import SkippedSamples, TrainingBatch, TrainingLoader
from .records import (
    StreamingDataset,
    TrainingDataset,
    UnreadableSampleError,
    load_training_data,
)


__all__ = [
    "BatchOrder",
    "SkippedSamples",
    "StreamingDataset",
    "TrainingBatch",
    "TrainingDataset",
    "TrainingLoader",
    "UnreadableSampleError",
    "find_bucket",
    "load_training_data",
    "read_jsonl",
]
