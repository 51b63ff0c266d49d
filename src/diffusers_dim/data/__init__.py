from .edit_dataset import EDIT_FIELDS, EditDataset, EpochSampler


__all__ = ["EDIT_FIELDS", "EditDataset", "EpochSampler"]
