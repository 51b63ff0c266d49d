from .checkpoints import checkpoint_step, latest_checkpoint, prune_checkpoints, save_checkpoint
from .objective import DIMTrainingModel, drop_condition, flow_matching_loss, get_sigmas, sample_timesteps


__all__ = [
    "DIMTrainingModel",
    "checkpoint_step",
    "drop_condition",
    "flow_matching_loss",
    "get_sigmas",
    "latest_checkpoint",
    "prune_checkpoints",
    "sample_timesteps",
    "save_checkpoint",
]
