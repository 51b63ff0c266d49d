from .shapes import EditScore, ShapesReport, evaluate_shapes, score_edit
from .sheets import SheetRow, draw_sheet


__all__ = ["EditScore", "SheetRow", "ShapesReport", "draw_sheet", "evaluate_shapes", "score_edit"]
