"""Who writes the blueprint of an edit: the pipeline's own model, another one, a server, a function or a file."""

from .blueprint import Blueprint, BlueprintError
from .cache import BlueprintCache
from .designer import Conversation, Design, Designer, DesignError, Draft
from .function import FunctionDesigner
from .openai import OpenAIDesigner
from .replay import ReplayDesigner
from .self_designer import SelfDesigner
from .vlm import VLMDesigner


__all__ = [
    "Blueprint",
    "BlueprintCache",
    "BlueprintError",
    "Conversation",
    "Design",
    "DesignError",
    "Designer",
    "Draft",
    "FunctionDesigner",
    "OpenAIDesigner",
    "ReplayDesigner",
    "SelfDesigner",
    "VLMDesigner",
]
