from .released import ConvertedCheckpoint, convert_released_checkpoint


__all__ = ["ConvertedCheckpoint", "convert_released_checkpoint"]
