from .arguments import (
    add_data_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_arguments,
)
from .batches import blank_sample, complete_pipeline, make_inputs
from .checkpoints import checkpoint_step, latest_checkpoint, prune_checkpoints, save_checkpoint
from .conditions import PrecomputedDataset, collate_encoded, encode_samples, make_placeholder
from .distributed import ShardedEMAModel, autocast, gather_weights, trained_weights
from .flops import training_flops
from .initialization import grow_null_condition, load_pipeline, load_sana, to_edit_pipeline, widen_patch_embedding
from .loop import train
from .model_card import push_to_hub, save_model_card
from .monitor import TrainingMonitor, draw_curves
from .objective import (
    DIMTrainingModel,
    drop_condition,
    flow_matching_loss,
    get_sigmas,
    loss_weights,
    sample_noise,
    sample_timesteps,
)
from .optimizers import create_optimizer
from .setup import (
    FROZEN_COMPONENTS,
    begin_run,
    count_train_steps,
    create_accelerator,
    create_loader,
    open_data,
    optimizer_settings,
    prepare_pipeline,
    publish,
    read_pipeline_kind,
    resume,
)
from .validation import log_validation, wants_validation


__all__ = [
    "DIMTrainingModel",
    "FROZEN_COMPONENTS",
    "PrecomputedDataset",
    "ShardedEMAModel",
    "TrainingMonitor",
    "add_data_arguments",
    "add_optimizer_arguments",
    "add_run_arguments",
    "add_validation_arguments",
    "autocast",
    "begin_run",
    "blank_sample",
    "check_arguments",
    "checkpoint_step",
    "collate_encoded",
    "complete_pipeline",
    "count_train_steps",
    "create_accelerator",
    "create_loader",
    "create_optimizer",
    "draw_curves",
    "drop_condition",
    "encode_samples",
    "flow_matching_loss",
    "gather_weights",
    "get_sigmas",
    "grow_null_condition",
    "latest_checkpoint",
    "load_pipeline",
    "load_sana",
    "log_validation",
    "loss_weights",
    "make_inputs",
    "make_placeholder",
    "open_data",
    "optimizer_settings",
    "prepare_pipeline",
    "prune_checkpoints",
    "publish",
    "push_to_hub",
    "read_pipeline_kind",
    "resume",
    "sample_noise",
    "sample_timesteps",
    "save_checkpoint",
    "save_model_card",
    "to_edit_pipeline",
    "train",
    "trained_weights",
    "training_flops",
    "wants_validation",
    "widen_patch_embedding",
]
