import builtins
import json
import re
from html.parser import HTMLParser

import pytest
from built_sets import make_rows, png, write_set
from PIL import Image

from diffusers_dim.data.engine.records import EngineSample
from diffusers_dim.data.engine.report import (
    compute_statistics,
    count_rows,
    draw_contact_sheet,
    dropped_entry,
    kept_entry,
    read_rows,
    sample_dropped,
    sample_rows,
    save_statistics,
)


DROPPED = [
    {"id": "x1", "image_path": "x1.png", "stage": "filter", "reason": "identical: 0.000% changed", "details": ""},
    {"id": "x2", "image_path": "x2.png", "stage": "assess", "reason": "misfit", "details": "The circle stays."},
    {"id": "x3", "image_path": "x3.png", "stage": "assess", "reason": "misfit", "details": "Nothing moves."},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "built", make_rows(12), DROPPED)


class Page(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.said = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said += data


def test_rows_come_in_order_over_all_shards(built):
    assert count_rows(built) == 12
    assert list(read_rows(built)) == make_rows(12)
    assert list(read_rows(built, ["prompt", "no such column"]))[11] == {"prompt": make_rows(12)[11]["prompt"]}


def test_drawn_rows_are_those_of_the_seed_in_order(built):
    drawn = [row["id"] for row in sample_rows(built, 5, seed=1)]
    assert drawn == [row["id"] for row in sample_rows(built, 5, seed=1)]
    assert drawn != [row["id"] for row in sample_rows(built, 5, seed=2)]
    assert len(set(drawn)) == 5 and drawn == sorted(drawn, key=lambda name: int(name.split("-")[1]))
    assert len(sample_rows(built, 100)) == 12


def test_drawn_dropped_lines_are_those_of_the_seed_in_order(tmp_path):
    write_set(tmp_path, [], [{"id": str(number)} for number in range(50)])
    drawn = [int(row["id"]) for row in sample_dropped(tmp_path, 8, seed=3)]
    assert drawn == sorted(set(drawn)) and len(drawn) == 8
    assert max(drawn) > 8
    assert drawn == [int(row["id"]) for row in sample_dropped(tmp_path, 8, seed=3)]


def test_broken_line_of_the_dropped_is_named(tmp_path):
    (tmp_path / "dropped.jsonl").write_text('{"id": "a"}\n{"id": \n')
    with pytest.raises(ValueError, match="dropped.jsonl, line 2 is not JSON"):
        sample_dropped(tmp_path, 5)


def test_folder_without_a_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no built set"):
        sample_rows(tmp_path, 5)


def test_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "data-00000.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(ValueError, match="data-00000.parquet cannot be read as Parquet"):
        count_rows(tmp_path)


def test_page_shows_pictures_mask_and_texts_of_each_sample(built, tmp_path):
    rows = sample_rows(built, 3)
    draw_contact_sheet([kept_entry(row) for row in rows], tmp_path / "sheet.html", "Three edits")
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 9
    assert all(image["src"].startswith("data:image/") and int(image["width"]) <= 256 for image in images)
    for row in rows:
        for name in ("id", "instruction", "better_instruction", "assessment", "assessment_reason", "prompt"):
            assert row[name] in page.said
    for word in ("Three edits", "source", "target", "what changed"):
        assert word in page.said


def test_page_loads_nothing_and_runs_nothing(tmp_path):
    evil = '"><script>alert(1)</script><img src=http://evil.test/x>&amp;'
    texts = ("id", "instruction", "better_instruction", "assessment_reason", "prompt", "edit_type")
    row = make_rows(1, **dict.fromkeys(texts, evil))[0]
    dropped = {"id": evil, "image_path": evil, "stage": evil, "reason": evil, "details": {evil: evil}}
    draw_contact_sheet([kept_entry(row), dropped_entry(dropped)], tmp_path / "sheet.html", evil)
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    loads = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(loads) == 3 and all(value.startswith("data:image/") for value in loads)
    assert evil in page.said
    assert ("meta", "default-src 'none'") in [
        (tag, attributes.get("content", "")[:18]) for tag, attributes in page.tags
    ]


def test_page_is_small_whatever_the_pictures_are(tmp_path):
    noise = Image.effect_noise((700, 500), 90).convert("RGB")
    row = make_rows(1, source=png(noise), target=png(noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))[0]
    assert len(row["source"]) > 500_000
    draw_contact_sheet([kept_entry(row)] * 4, tmp_path / "sheet.html")
    assert (tmp_path / "sheet.html").stat().st_size < 4 * 250_000


def test_picture_that_cannot_be_read_is_told_in_its_place(tmp_path):
    row = make_rows(1)[0]
    row["target"] = row["target"][:100]
    for name in ("sheet.html", "sheet.png"):
        draw_contact_sheet([kept_entry(row)], tmp_path / name)
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    assert "cannot be read as a picture" in page.said
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1


def test_dropped_samples_are_shown_with_their_pictures_where_these_are_at_hand(tmp_path):
    row = make_rows(1)[0]
    sample = EngineSample("x2", row["target"], row["source"], "Make it blue.")
    entries = [dropped_entry(DROPPED[1], sample), dropped_entry(DROPPED[2])]
    draw_contact_sheet(entries, tmp_path / "sheet.html")
    draw_contact_sheet(entries, tmp_path / "sheet.png")
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3
    for word in ("x2: misfit", "The circle stays.", "Make it blue.", "x3: misfit", "Nothing moves."):
        assert word in page.said


def test_captions_are_shown_with_their_one_picture(tmp_path):
    row = make_rows(1)[0]
    entry = kept_entry({"id": "c", "image_path": "c.png", "target": row["target"], "prompt": "Four shapes."})
    assert [name for name, _ in entry.pictures] == ["picture"]
    assert entry.texts == {"caption": "Four shapes."}
    draw_contact_sheet([entry], tmp_path / "sheet.png")


def test_png_sheet_has_a_row_a_sample(built, tmp_path):
    entries = [kept_entry(row) for row in sample_rows(built, 4)]
    draw_contact_sheet(entries, tmp_path / "four.png")
    draw_contact_sheet(entries[:2], tmp_path / "two.png")
    four, two = Image.open(tmp_path / "four.png"), Image.open(tmp_path / "two.png")
    assert four.width == two.width > 5 * 256
    assert four.height > 1.9 * two.height - 60


@pytest.mark.parametrize(("name", "entries"), [("sheet.txt", 1), ("sheet.html", 0)])
def test_sheet_that_cannot_be_drawn_is_refused(built, tmp_path, name, entries):
    with pytest.raises(ValueError, match="end in .html or .png|no samples"):
        draw_contact_sheet([kept_entry(row) for row in make_rows(entries or 1)][:entries], tmp_path / name)


def test_statistics_count_all_rows_and_drops(built):
    found = compute_statistics(built).as_dict()
    rows = make_rows(12)
    assert found["rows"] == 12
    assert found["dropped"] == {"filter": {"identical": 1}, "assess": {"misfit": 2}}
    assert found["sizes"] == {"64x64": 12}
    assert found["assessments"] == {"fits": 8, "partly": 4}
    assert sum(found["edit_types"].values()) == 12 and found["edit_types"]["recolor"] == 2
    words = sorted(len(row["better_instruction"].split()) for row in rows)
    assert found["lengths"]["better_instruction"]["words"] == {
        "min": words[0],
        "median": words[5],
        "mean": round(sum(words) / 12, 2),
        "95th percentile": words[11],
        "max": words[11],
    }
    assert found["lengths"]["prompt"]["characters"]["max"] == max(len(row["prompt"]) for row in rows)


def test_reasons_without_end_are_bounded(tmp_path):
    dropped = ({"stage": "filter", "reason": f"reason {number}"} for number in range(3000))
    write_set(tmp_path, make_rows(1), dropped)
    reasons = compute_statistics(tmp_path).as_dict()["dropped"]["filter"]
    assert len(reasons) == 1001 and reasons["(others)"] == 2000


def test_table_tells_the_most_frequent(built):
    table = compute_statistics(built).table()
    assert table.startswith("12 samples, 3 dropped\n")
    lines = {line.strip(): line for line in table.splitlines()}
    assert any(re.fullmatch(r"misfit +2", line) for line in lines)
    assert any(re.match(r"better instruction, words +\d+ +\d+ +\d+ +\d+ +\d+$", line) for line in lines)


def test_statistics_are_written_as_json_or_drawn(built, tmp_path):
    found = compute_statistics(built)
    save_statistics(found, tmp_path / "stats.json")
    assert json.loads((tmp_path / "stats.json").read_text()) == found.as_dict()
    save_statistics(found, tmp_path / "stats.png")
    assert Image.open(tmp_path / "stats.png").size == (1300, 800)
    with pytest.raises(ValueError, match="end in .json or .png, but is 'stats.svg'"):
        save_statistics(found, tmp_path / "stats.svg")


def test_plots_of_odd_names_are_drawn(tmp_path):
    rows = make_rows(2, edit_type="$a_{b$ \\frac 100% " * 8, assessment="")
    write_set(tmp_path, rows, [{"stage": "s", "reason": "$x" + "y" * 80 + end} for end in "ab"])
    save_statistics(compute_statistics(tmp_path), tmp_path / "stats.png")
    assert Image.open(tmp_path / "stats.png").width == 1300


def test_plots_without_matplotlib_say_what_to_install(built, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    found = compute_statistics(built)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="matplotlib: `pip install 'diffusers-dim"):
        save_statistics(found, tmp_path / "stats.png")
