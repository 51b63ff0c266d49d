from .pipeline_dim import DIMPipeline
from .pipeline_dim_edit import DIMEditPipeline
from .pipeline_output import DIMPipelineOutput


__all__ = ["DIMEditPipeline", "DIMPipeline", "DIMPipelineOutput"]
