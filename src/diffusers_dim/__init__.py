"""Draw-In-Mind (DIM) as a diffusers-native package. Names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_MODULE_OF = {
    "DIMConnector": "models.connector_dim",
    "DIMProcessor": "models.processing_dim",
    "DIMTransformer2DModel": "models.transformer_dim",
    "DIMImageProcessor": "image_processor",
    "DIMPipeline": "pipelines.pipeline_dim",
    "DIMEditPipeline": "pipelines.pipeline_dim_edit",
    "DIMPipelineOutput": "pipelines.pipeline_output",
    "DIMBlocks": "modular_pipelines",
    "DIMEditBlocks": "modular_pipelines",
    "DIMEditModularPipeline": "modular_pipelines",
    "DIMModularPipeline": "modular_pipelines",
    "Blueprint": "designers",
    "BlueprintCache": "designers",
    "DesignError": "designers",
    "Designer": "designers",
    "FunctionDesigner": "designers",
    "OpenAIDesigner": "designers",
    "ReplayDesigner": "designers",
    "SelfDesigner": "designers",
    "VLMDesigner": "designers",
    "convert_released_checkpoint": "loaders.released",
    "TINY_SHAPES": "tiny",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .designers import Blueprint as Blueprint
    from .designers import BlueprintCache as BlueprintCache
    from .designers import Designer as Designer
    from .designers import DesignError as DesignError
    from .designers import FunctionDesigner as FunctionDesigner
    from .designers import OpenAIDesigner as OpenAIDesigner
    from .designers import ReplayDesigner as ReplayDesigner
    from .designers import SelfDesigner as SelfDesigner
    from .designers import VLMDesigner as VLMDesigner
    from .image_processor import DIMImageProcessor as DIMImageProcessor
    from .loaders.released import convert_released_checkpoint as convert_released_checkpoint
    from .models import DIMConnector as DIMConnector
    from .models import DIMProcessor as DIMProcessor
    from .models import DIMTransformer2DModel as DIMTransformer2DModel
    from .modular_pipelines import DIMBlocks as DIMBlocks
    from .modular_pipelines import DIMEditBlocks as DIMEditBlocks
    from .modular_pipelines import DIMEditModularPipeline as DIMEditModularPipeline
    from .modular_pipelines import DIMModularPipeline as DIMModularPipeline
    from .pipelines import DIMEditPipeline as DIMEditPipeline
    from .pipelines import DIMPipeline as DIMPipeline
    from .pipelines import DIMPipelineOutput as DIMPipelineOutput
    from .tiny import TINY_SHAPES as TINY_SHAPES


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
