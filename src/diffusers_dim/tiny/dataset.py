"""Edits of the picture world as a dataset on disk, in the form in which DIM-Edit was released."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from diffusers_dim.tiny.world import sample_edits


PROMPTS = ("instruction", "blueprint", "both")


def write_edits(
    folder: str | Path,
    count: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    prompts: str = "instruction",
    size: int = 64,
) -> Path:
    """Write pictures and a jsonl of `id`, `image_path`, `image_path_target`, `prompt` and `kind`.

    Args:
        folder: Where to; made if it is not there.
        count: How many edits, at least 1.
        seed: The same seed gives the same edits.
        kinds: The edit kinds to draw from; all of `EDIT_KINDS` by default.
        prompts: Each edit's "instruction", its "blueprint", or "both", a line each.
        size: Side of the pictures in pixels.

    Returns:
        The jsonl's path, `folder/edits.jsonl`, written last.

    Raises:
        ValueError: A number, a kind or `prompts` is outside what is allowed.
    """
    if prompts not in PROMPTS:
        raise ValueError(f"`prompts` is {prompts!r}, but must be one of {', '.join(PROMPTS)}.")
    samples = sample_edits(count, seed, size, kinds)
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, edit in enumerate(tqdm(samples, desc=f"Edits to {folder.name}", disable=None)):
        row = {
            "id": f"shapes-{index:06}",
            "image_path": f"images/{index:06}_source.png",
            "image_path_target": f"images/{index:06}_target.png",
        }
        edit.source.save(folder / row["image_path"], compress_level=1)
        edit.target.save(folder / row["image_path_target"], compress_level=1)
        if prompts != "blueprint":
            rows.append({**row, "prompt": edit.instruction, "kind": edit.kind})
        if prompts != "instruction":
            rows.append({**row, "id": f"{row['id']}-blueprint", "prompt": edit.blueprint, "kind": edit.kind})
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    """Write edits by `python -m diffusers_dim.tiny.dataset`."""
    parser = argparse.ArgumentParser(description="Write edits of the picture world.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", help="Edit kinds to draw from, one named twice twice as often; all six by default."
    )
    parser.add_argument("--prompts", choices=PROMPTS, default="instruction")
    args = parser.parse_args()
    try:
        print(write_edits(args.output_dir, args.count, args.seed, args.kinds, args.prompts))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
