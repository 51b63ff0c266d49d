from .archives import find_parts, stream_members, unpack_images
from .dim_edit import load_dim_edit
from .dim_t2i import T2I_SOURCES, CaptionSource, load_dim_t2i
from .mappings import MAPPINGS, ColumnMapping, map_columns
from .samples import iter_samples, read_samples
from .tables import MissingPictures


__all__ = [
    "MAPPINGS",
    "T2I_SOURCES",
    "CaptionSource",
    "ColumnMapping",
    "MissingPictures",
    "find_parts",
    "iter_samples",
    "load_dim_edit",
    "load_dim_t2i",
    "map_columns",
    "read_samples",
    "stream_members",
    "unpack_images",
]
