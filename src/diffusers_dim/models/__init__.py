from .connector_dim import DIMConnector, DIMConnectorOutput
from .processing_dim import DIMProcessor
from .transformer_dim import DIMTransformer2DModel


__all__ = ["DIMConnector", "DIMConnectorOutput", "DIMProcessor", "DIMTransformer2DModel"]
