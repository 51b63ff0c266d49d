"""Built sets as the engine leaves them, made by hand."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from diffusers_dim.data.engine.records import EngineSample
from diffusers_dim.tiny import sample_edits


def png(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def make_rows(count, **columns):
    """Rows of the picture world, with `columns` in the place of their own."""
    rows = []
    for index, edit in enumerate(sample_edits(count, seed=5)):
        source, target = png(edit.source), png(edit.target)
        row = {
            "id": f"edit-{index}",
            "image_path": f"{index}_source.png",
            "image_path_target": f"{index}_target.png",
            "source": source,
            "target": target,
            "prompt": edit.blueprint,
            "instruction": "Change it.",
            "better_instruction": edit.instruction,
            "assessment": "partly" if index % 3 == 0 else "fits",
            "assessment_reason": "It does not say what.",
            "edit_type": edit.kind,
            "key": EngineSample(f"edit-{index}", target, source, "Change it.").key,
        }
        rows.append(row | columns)
    return rows


def write_set(folder, rows, dropped=(), summary=None, shard_size=5):
    """Writes a folder as `DataEngine` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(rows), shard_size)):
        pq.write_table(pa.Table.from_pylist(rows[first : first + shard_size]), folder / f"data-{shard:05}.parquet")
    (folder / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dropped), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary or {}), encoding="utf-8")
    return folder
