"""Released data in the layouts that they were released in, and foreign data with the column names of the Hub."""

import gzip
import io
import json
import multiprocessing
import resource
import tarfile
import time
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusers_dim.data import load_training_data
from diffusers_dim.data.released import (
    MAPPINGS,
    T2I_SOURCES,
    MissingPictures,
    find_parts,
    iter_samples,
    load_dim_edit,
    load_dim_t2i,
    map_columns,
    read_samples,
    stream_members,
    unpack_images,
)


def png(seed, size=(24, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)  # which gzip cannot shrink
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def edits(count):
    """DIM-Edit's rows; every third has the source of the one before."""
    return [
        {
            "id": f"edit-{i}",
            "image_path": f"image/source/{i - (i % 3 == 2)}.png",
            "image_path_target": f"image/target/{i}.png",
            "prompt": f"blueprint {i}",
        }
        for i in range(count)
    ]


def pictures(rows):
    paths = {row[name] for row in rows for name in ("image_path", "image_path_target")}
    return {path: png(number) for number, path in enumerate(sorted(paths))}


def tar_gz(files, describe=None):
    """A gzipped tar of files by their names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1_700_000_000
            if describe is not None:
                describe(member)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_parts(folder, archive, sizes, names=("aa", "ab", "ac", "ad", "ae")):
    """The parts as `split` makes them, but each of a size of its own, the last with the rest."""
    start = 0
    for name, size in zip(names, [*sizes, len(archive)]):
        (folder / f"images.tar.gz.part{name}").write_bytes(archive[start : start + size])
        start += size
    return folder


def write_dim_edit(folder, count=9, shuffle=True, drop=()):
    rows = edits(count)
    files = pictures(rows)
    order = sorted(files, key=lambda name: zlib.crc32(name.encode()) if shuffle else name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tos_dataset_edit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    archive = tar_gz({name: files[name] for name in order if name not in drop})
    write_parts(folder, archive, (1237, 3331, 1013))
    return rows, files


def decoded(rows):
    """What can be compared: pixels instead of pictures."""
    rows = [{k: np.asarray(v).tolist() if isinstance(v, Image.Image) else v for k, v in row.items()} for row in rows]
    return sorted(rows, key=lambda row: row["id"])


def in_a_process(work):
    """What work sends through a pipe."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# The archive and its parts


@pytest.mark.parametrize("sizes", [(1,), (7, 1, 13), (1000, 1, 999), (512, 512, 512, 512)])
def test_members_come_whole_and_in_order_through_parts_of_any_size(tmp_path, sizes):
    files = {f"image/{name}.png": png(number) for number, name in enumerate("zebra apple".split())}
    write_parts(tmp_path, tar_gz(files), sizes)
    members = list(stream_members(tmp_path))
    assert [(member.name, member.data) for member in members] == list(files.items())


@pytest.mark.parametrize("names", ["00 01 02", "-aa -ab -ac", ".1 .2 .3", "_000 _001 _002"])
def test_parts_are_put_in_order_by_any_of_the_names_that_split_gives(tmp_path, names):
    write_parts(tmp_path, b"abc", (1, 1), names.split())
    assert b"".join(path.read_bytes() for path in find_parts(tmp_path)) == b"abc"


def test_ten_parts_without_leading_zeros_are_in_the_order_of_their_numbers(tmp_path):
    write_parts(tmp_path, bytes(range(11)), [1] * 10, [str(number) for number in range(11)])
    assert b"".join(path.read_bytes() for path in find_parts(tmp_path)) == bytes(range(11))


@pytest.mark.parametrize(
    "names, missing", [("aa ab ad", "partac"), ("ab ac", "partaa"), ("00 03", "part01.*part02"), ("az bb", "partba")]
)
def test_missing_parts_are_named(tmp_path, names, missing):
    write_parts(tmp_path, b"abc", (1, 1), names.split())
    with pytest.raises(ValueError, match=f"missing: .*{missing}"):
        find_parts(tmp_path)


def test_a_folder_without_parts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither images.tar.gz nor parts"):
        find_parts(tmp_path)


def test_an_empty_part_is_named(tmp_path):
    write_parts(tmp_path, b"ab", (1, 0), ("aa", "ab", "ac"))
    with pytest.raises(ValueError, match="partab is empty"):
        find_parts(tmp_path)


def test_an_archive_that_ends_early_names_the_part_it_ends_in(tmp_path):
    archive = tar_gz({"image/a.png": png(0), "image/b.png": png(1)})
    write_parts(tmp_path, archive[:-200], (500, 500))
    with pytest.raises(ValueError, match=r"ends early, in images\.tar\.gz\.partac"):
        list(stream_members(tmp_path))


def test_a_part_in_the_middle_that_is_too_short_is_named_with_its_size(tmp_path):
    write_parts(tmp_path, tar_gz({f"{i}.png": png(i) for i in range(4)}), (900, 900, 900))
    short = tmp_path / "images.tar.gz.partab"
    short.write_bytes(short.read_bytes()[:333])
    with pytest.raises(ValueError, match=r"fewer bytes than the largest.*partab \(333\)"):
        list(stream_members(tmp_path))


def test_an_archive_damaged_behind_its_last_file_is_still_found_out(tmp_path):
    archive = tar_gz({"a.png": png(0)})
    write_parts(tmp_path, archive[:-8] + b"\0\0\0\0" + archive[-4:], (500,))
    with pytest.raises(ValueError, match="is damaged.*CRC"):
        list(stream_members(tmp_path))


def test_a_broken_header_is_not_taken_for_the_end(tmp_path):
    tar = bytearray(gzip.decompress(tar_gz({f"{i}.png": png(i) for i in range(3)})))
    second = 512 + -(-len(png(0)) // 512) * 512
    tar[second : second + 10] = b"\xff" * 10
    (tmp_path / "images.tar.gz").write_bytes(gzip.compress(tar))
    with pytest.raises(ValueError, match="is damaged"):
        list(stream_members(tmp_path))


@pytest.mark.parametrize(
    "start, match",
    [(b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"), (b"\0" * 50, "is it the first part")],
)
def test_what_is_no_gzip_file_is_told(tmp_path, start, match):
    (tmp_path / "images.tar.gz").write_bytes(start)
    with pytest.raises(ValueError, match=match):
        list(stream_members(tmp_path))


def link(member):
    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0


def hard_link(member):
    member.type, member.linkname, member.size = tarfile.LNKTYPE, "../../secret", 0


def device(member):
    member.type, member.size = tarfile.CHRTYPE, 0


@pytest.mark.parametrize(
    "name, describe",
    [
        ("/etc/passwd", None),
        ("../outside.png", None),
        ("image/../../outside.png", None),
        ("image/a.png", link),
        ("image/a.png", hard_link),
        ("image/a.png", device),
    ],
)
def test_unsafe_members_are_refused_and_nothing_is_written(tmp_path, name, describe):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/images.tar.gz").write_bytes(tar_gz({name: b"harm"}, describe))
    with pytest.raises(ValueError, match="refused"):
        unpack_images(tmp_path / "data", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["images.tar.gz"]


def test_a_file_above_the_limit_is_refused(tmp_path):
    (tmp_path / "images.tar.gz").write_bytes(tar_gz({"a.png": b"x" * 1001}))
    with pytest.raises(ValueError, match="1001 bytes, above 1000"):
        unpack_images(tmp_path, max_file_bytes=1000, progress=False)


def test_a_decompression_bomb_is_refused(tmp_path):
    (tmp_path / "images.tar.gz").write_bytes(tar_gz({"zeros": bytes(90 << 20)}))
    with pytest.raises(ValueError, match="decompression bomb"):
        list(stream_members(tmp_path))


def test_unpacking_writes_all_and_a_finished_one_is_left_alone(tmp_path):
    rows, files = write_dim_edit(tmp_path / "data")
    unpack_images(tmp_path / "data", tmp_path / "out", progress=False)
    there = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out/image").rglob("*.png")}
    assert {name: path.read_bytes() for name, path in there.items()} == files
    there["image/target/0.png"].write_bytes(b"mine")
    unpack_images(tmp_path / "data", tmp_path / "out", progress=False)
    assert there["image/target/0.png"].read_bytes() == b"mine"


def test_a_killed_unpacking_goes_on_without_writing_finished_files_again(tmp_path):
    files = {f"image/{i:04}.png": png(i) for i in range(1200)}
    write_parts(tmp_path, tar_gz(files), (100_001, 300_007))
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(
        target=unpack_images, args=(tmp_path, out), kwargs={"progress": False}
    )
    process.start()
    while process.is_alive() and not (out / "image/0050.png").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    finished = {path: path.stat().st_ino for path in out.glob("image/*.png")}
    assert 50 <= len(finished) < 1200, "it was to be killed halfway"
    assert not (out / ".images.tar.gz.unpacked.json").exists()

    unpack_images(tmp_path, out, progress=False)
    assert {f"image/{path.name}": path.read_bytes() for path in out.glob("image/*")} == files
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert json.loads((out / ".images.tar.gz.unpacked.json").read_text())["files"] == 1200


def test_a_full_disk_leaves_what_was_finished_and_nothing_half(tmp_path):
    write_parts(tmp_path, tar_gz({"image/a.png": png(0), "image/b.png": png(1, (200, 200))}), ())

    def run(pipe):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            unpack_images(tmp_path, tmp_path / "out", progress=False)
        except OSError as error:
            pipe.send(str(error))

    assert "File too large" in in_a_process(run)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["a.png"]
    assert (tmp_path / "out/image/a.png").read_bytes() == png(0)


def test_unpacking_goes_on_once_the_missing_part_is_there(tmp_path):
    write_dim_edit(tmp_path)
    last = tmp_path / "images.tar.gz.partad"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ValueError, match="ends early, in images.tar.gz.partac"):
        unpack_images(tmp_path, progress=False)
    assert list(tmp_path.glob("image/*/*.png"))
    last.write_bytes(content)
    unpack_images(tmp_path, progress=False)
    assert len(load_dim_edit(tmp_path, cache_dir=tmp_path / "cache")) == 9


# DIM-Edit


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_out_of_the_parts_equals_the_unpacked_table(tmp_path, shuffle):
    rows, files = write_dim_edit(tmp_path, shuffle=shuffle)
    streamed = decoded(load_dim_edit(tmp_path, streaming=True))
    unpack_images(tmp_path, progress=False)
    table = load_dim_edit(tmp_path, cache_dir=tmp_path / "cache")
    assert table.column_names == ["id", "source", "target", "prompt"]
    assert decoded(table) == streamed
    assert decoded(load_dim_edit(tmp_path, streaming=True)) == streamed
    expected = [np.asarray(Image.open(io.BytesIO(files[row["image_path"]]))).tolist() for row in rows]
    assert [row["source"] for row in streamed] == expected
    assert [row["prompt"] for row in streamed] == [row["prompt"] for row in rows]


def test_pictures_packed_are_not_loaded_as_a_table(tmp_path):
    write_dim_edit(tmp_path)
    with pytest.raises(ValueError, match="unpack them by `unpack_images"):
        load_dim_edit(tmp_path)


@pytest.mark.parametrize("streaming", [True, False])
def test_edits_without_a_picture_are_counted_and_listed(tmp_path, streaming, caplog):
    absent = {"image/source/0.png", "image/target/4.png"}
    rows, _ = write_dim_edit(tmp_path, drop=absent)
    if not streaming:
        unpack_images(tmp_path, progress=False)
    missing = MissingPictures(tmp_path / "missing.txt")
    found = list(load_dim_edit(tmp_path, streaming, missing=missing, cache_dir=tmp_path / "cache"))
    assert {row["id"] for row in found} == {row["id"] for row in rows} - {"edit-0", "edit-4"}
    listed = [json.loads(line) for line in (tmp_path / "missing.txt").read_text().splitlines()]
    assert listed == missing.first
    assert {row["id"]: row["image_path"] for row in listed} == {
        "edit-0": "image/source/0.png",
        "edit-4": "image/target/4.png",
    }
    assert missing.counts == {"DIM-Edit": 2}
    assert "2 rows were left out" in caplog.text


def test_an_archive_with_other_paths_is_an_error_that_shows_both(tmp_path):
    write_dim_edit(tmp_path)
    for path in tmp_path.glob("images*"):
        path.unlink()
    (tmp_path / "images.tar.gz").write_bytes(tar_gz({"pictures/0.png": png(0)}))
    with pytest.raises(ValueError, match="'image/source/0.png'.*'pictures/0.png'"):
        list(load_dim_edit(tmp_path, streaming=True))


def test_pairs_too_far_apart_to_be_held_are_an_error(tmp_path):
    write_dim_edit(tmp_path, shuffle=False)
    with pytest.raises(ValueError, match="wait for the other of their pair"):
        list(load_dim_edit(tmp_path, streaming=True, max_waiting_bytes=2000))


def test_a_stream_with_a_missing_part_tells_at_once(tmp_path):
    write_dim_edit(tmp_path)
    (tmp_path / "images.tar.gz.partab").unlink()
    with pytest.raises(ValueError, match="missing: images.tar.gz.partab"):
        load_dim_edit(tmp_path, streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "line, match",
    [
        ('{"id": "x", "image_path": "image/sou', "line 10 is not JSON.*perhaps it was cut off"),
        ('{"id": "x"}\n', "line 10 lacks .*image_path.*and has"),
        (
            json.dumps({"id": "x", "image_path": "../x.png", "image_path_target": "y.png", "prompt": ""}) + "\n",
            "line 10: the path '../x.png' leads out",
        ),
        (
            json.dumps({"id": "x", "image_path": "/etc/passwd", "image_path_target": "y.png", "prompt": ""}) + "\n",
            "line 10: the path '/etc/passwd' leads out",
        ),
    ],
)
def test_a_bad_line_of_the_jsonl_is_named(tmp_path, streaming, line, match):
    write_dim_edit(tmp_path)
    if not streaming:
        unpack_images(tmp_path, progress=False)
    with open(tmp_path / "tos_dataset_edit.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=match):
        list(load_dim_edit(tmp_path, streaming, cache_dir=tmp_path / "cache"))


def test_training_reads_the_saved_table(tmp_path):
    rows, files = write_dim_edit(tmp_path)
    unpack_images(tmp_path, progress=False)
    load_dim_edit(tmp_path, cache_dir=tmp_path / "cache").save_to_disk(tmp_path / "saved")
    data = load_training_data("edit", dataset_name=str(tmp_path / "saved"))
    assert len(data) == len(rows)
    assert data[1]["id"] == "edit-1" and data[1]["prompt"] == "blueprint 1"
    expected = np.asarray(Image.open(io.BytesIO(files["image/target/1.png"])))
    assert np.array_equal(np.asarray(data[1]["target"]), expected)


# DIM-T2I

T2I_KEYS = {
    "blip3-kale": ["a1b2", "c3d4", "e5f6"],
    "capsfusion-120m": [f"https://example.org/{name}.jpg?size=1" for name in "abc"],
    "ureader": ["DUE/TabFact/pngs/2-1-5", "DUE/TabFact/pngs/2-1-6", "other/3"],
    "textvqa": [f"train_images/{name}.jpg" for name in "abc"],
}


def write_captions(folder, source, keys=None):
    keys = T2I_KEYS[source] if keys is None else keys
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image_path": key, "prompt": f"a long caption of {key}"} for key in keys]
    (folder / T2I_SOURCES[source].file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_files(folder, source):
    for number, key in enumerate(T2I_KEYS[source]):
        path = folder / (f"{number:05}" if source == "capsfusion-120m" else key)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source != "textvqa":
            path = path.with_name(path.name + ".png")
        path.write_bytes(png(number))
        if source == "capsfusion-120m":
            path.with_suffix(".json").write_text(json.dumps({"url": key, "status": "success"}))


def as_tars(folder, source):
    """As img2dataset writes them, with the key's column in the json; UReader's own are named by the key."""
    for shard, numbers in enumerate(([0, 1], [2])):
        files = {}
        for number in numbers:
            key = T2I_KEYS[source][number]
            name = key if source in ("ureader", "textvqa") else f"{shard:05}{number:04}"
            stem = name.removesuffix(".jpg")
            files[f"{stem}.jpg"] = png(number)
            if source not in ("ureader", "textvqa"):
                files[f"{stem}.json"] = json.dumps({T2I_SOURCES[source].column: key}).encode()
            files[f"{stem}.txt"] = b"a short caption"
        write_tar(folder / f"{shard:05}.tar", files)
        pq.write_table(pa.table({"key": ["0"], "url": ["x"]}), folder / f"{shard:05}.parquet")  # of img2dataset


def as_parquet(folder, source):
    keys = T2I_KEYS[source]
    column = T2I_SOURCES[source].column
    features = datasets.Features({column: datasets.Value("string"), "image": datasets.Image()})
    for shard, numbers in enumerate(([2], [1, 0])):
        rows = {
            column: [keys[n] for n in numbers],
            "image": [{"bytes": png(n), "path": None} for n in numbers],
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / f"data/train-{shard}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=1)


CASES = [(source, as_files) for source in T2I_KEYS] + [(source, as_tars) for source in T2I_KEYS]
CASES += [(source, as_parquet) for source in ("blip3-kale", "capsfusion-120m", "ureader")]


@pytest.mark.parametrize("source, write", CASES)
def test_captions_are_joined_to_pictures_in_any_form(tmp_path, source, write):
    write_captions(tmp_path / "captions", source)
    write(tmp_path / "pictures", source)
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    table = load_dim_t2i(tmp_path / "captions", {source: tmp_path / "pictures"}, **options)
    stream = load_dim_t2i(tmp_path / "captions", {source: tmp_path / "pictures"}, streaming=True, **options)
    assert decoded(table) == decoded(stream)
    rows = {row["key"]: row for row in table}
    for number, key in enumerate(T2I_KEYS[source]):
        assert rows[key]["prompt"] == f"a long caption of {key}"
        assert rows[key]["dataset"] == source and rows[key]["id"] == f"{source}-{number + 1}"
        expected = np.asarray(Image.open(io.BytesIO(png(number))))
        assert np.array_equal(np.asarray(rows[key]["image"].convert("RGB")), expected)


def test_captions_without_a_picture_are_counted_and_listed_by_source(tmp_path):
    write_captions(tmp_path, "blip3-kale")
    write_captions(tmp_path, "textvqa", [*T2I_KEYS["textvqa"], "train_images/lost.jpg"])
    as_tars(tmp_path / "kale", "blip3-kale")
    (tmp_path / "kale/00000.tar").unlink()
    as_files(tmp_path / "textvqa", "textvqa")
    missing = MissingPictures()
    folders = {"blip3-kale": tmp_path / "kale", "textvqa": tmp_path / "textvqa"}
    table = load_dim_t2i(tmp_path, folders, missing=missing, cache_dir=tmp_path / "cache", progress=False)
    assert missing.counts == {"blip3-kale": 2, "textvqa": 1}
    assert [row["image_path"] for row in missing.first] == ["a1b2", "c3d4", "train_images/lost.jpg"]
    assert missing.first[2]["id"] == "textvqa-4"
    assert sorted(table["key"]) == sorted(["e5f6", *T2I_KEYS["textvqa"]])


def test_rows_out_of_order_in_large_parquet_files_are_joined(tmp_path):
    keys = [f"k{number}" for number in np.random.default_rng(0).permutation(500)]
    write_captions(tmp_path, "blip3-kale", keys)
    content = [f"picture {number}".encode() for number in range(500)]
    table = pa.table({"uid": [f"k{number}" for number in range(500)], "jpg": content})
    (tmp_path / "kale").mkdir()
    pq.write_table(table, tmp_path / "kale/0.parquet", row_group_size=70)
    folders = {"blip3-kale": tmp_path / "kale"}
    stream = load_dim_t2i(tmp_path, folders, streaming=True, cache_dir=tmp_path / "cache", progress=False)
    rows = list(stream.cast_column("image", datasets.Image(decode=False)))
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(500)]
    assert [row["image"]["bytes"] for row in rows] == content


def test_the_table_of_sources_has_seventeen_files_and_the_released_counts():
    assert len({facts.file for facts in T2I_SOURCES.values()}) == 17
    assert sum(facts.samples for facts in T2I_SOURCES.values()) == 6_309_918
    counts = {"pixmo-docs": 109_142, "allava": 46_610}  # those of several files
    for name, count in counts.items():
        assert sum(facts.samples for source, facts in T2I_SOURCES.items() if source.startswith(name)) == count


def test_unknown_sources_missing_files_and_missing_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="not \\['laion'\\]"):
        load_dim_t2i(tmp_path, {"laion": tmp_path})
    with pytest.raises(ValueError, match="at least"):
        load_dim_t2i(tmp_path, {})
    with pytest.raises(ValueError, match="textvqa.jsonl is not there"):
        load_dim_t2i(tmp_path, {"textvqa": tmp_path})
    write_captions(tmp_path, "textvqa")
    with pytest.raises(ValueError, match="nowhere is not there"):
        load_dim_t2i(tmp_path, {"textvqa": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="None of the captions"):
        load_dim_t2i(tmp_path, {"textvqa": tmp_path}, cache_dir=tmp_path / "cache", progress=False)


def test_bad_captions_and_pictures_are_named(tmp_path):
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    write_captions(tmp_path, "textvqa", ["../../etc/passwd"])
    with pytest.raises(ValueError, match="textvqa.jsonl, line 1: the path '../../etc/passwd' leads out"):
        load_dim_t2i(tmp_path, {"textvqa": tmp_path}, **options)

    (tmp_path / "textvqa.jsonl").write_text('{"image_path": "a.jpg", "text": "x"}\n{"image_pa')
    with pytest.raises(ValueError, match="textvqa.jsonl, line 2 is not JSON"):
        load_dim_t2i(tmp_path, {"textvqa": tmp_path}, **options)

    write_captions(tmp_path, "blip3-kale")
    (tmp_path / "kale").mkdir()
    pq.write_table(pa.table({"image": [b"x"], "key": ["a1b2"]}), tmp_path / "kale/0.parquet")
    with pytest.raises(ValueError, match="needs a column 'uid' of keys, but has \\['image', 'key'\\]"):
        load_dim_t2i(tmp_path, {"blip3-kale": tmp_path / "kale"}, **options)

    as_tars(tmp_path / "tars", "blip3-kale")
    broken = tmp_path / "tars/00000.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(ValueError, match="00000.tar is damaged"):
        load_dim_t2i(tmp_path, {"blip3-kale": tmp_path / "tars"}, **options)


def test_training_reads_the_saved_captions(tmp_path):
    write_captions(tmp_path, "blip3-kale")
    as_parquet(tmp_path / "kale", "blip3-kale")
    table = load_dim_t2i(tmp_path, {"blip3-kale": tmp_path / "kale"}, cache_dir=tmp_path / "cache", progress=False)
    table.save_to_disk(tmp_path / "saved")
    data = load_training_data("t2i", dataset_name=str(tmp_path / "saved"))
    assert len(data) == 3
    assert data[0]["target"].size == (24, 16) and data[0]["prompt"].startswith("a long caption")
    samples = list(iter_samples(table, kind="t2i"))
    assert {sample.target for sample in samples} == {png(0), png(1), png(2)}
    assert all(sample.source is None and sample.instruction.startswith("a long caption") for sample in samples)


# Foreign data


def image(number):
    return {"bytes": png(number), "path": None}


def foreign(name, folder):
    """Two edits as a data set of the Hub has them, pictures number 0 and 1 of the first, 2 and 3 of the second."""
    for number in range(4):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / f"pictures/{number}.png").write_bytes(png(number))
    paths = [f"pictures/{number}.png" for number in range(4)]
    images = {"sources": [image(0), image(2)], "targets": [image(1), image(3)]}
    texts = ["make it red", "remove the cat"]
    rows = {
        "ultraedit": {
            "clip_sim_source": [0.3, 0.2],
            "source_caption": ["a", "b"],
            "idx": [7, 8],
            "edit_prompt": texts,
            "edit_object": [None, None],
            "source_image": images["sources"],
            "edited_image": images["targets"],
            "mask_image": [None, None],
        },
        "magicbrush": {
            "img_id": ["242679", "242679"],
            "turn_index": [1, 2],
            "source_img": images["sources"],
            "mask_img": images["targets"],
            "instruction": texts,
            "target_img": images["targets"],
        },
        "seed-data-edit": {"source_image": paths[::2], "target_image": paths[1::2], "instruction": texts},
        "sharegpt-4o-image": {
            "input_prompt": texts,
            "input_image": [[path] for path in paths[::2]],
            "output_image": paths[1::2],
            "output_image_resolution": ["1024x1024", "1024x1024"],
        },
        "imgedit": {
            "input_images": [[path] for path in paths[::2]],
            "output_images": [[path] for path in paths[1::2]],
            "prompt": texts,
        },
        "omniedit": {
            "omni_edit_id": ["task_obj_add_1", "task_obj_add_2"],
            "task": ["addition", "addition"],
            "src_img": images["sources"],
            "edited_img": images["targets"],
            "edited_prompt_list": [[text, "the same at greater length"] for text in texts],
            "width": [24, 24],
            "o_score": [9.0, 10.0],
        },
    }[name]
    dataset = datasets.Dataset.from_dict(rows)
    for column in dataset.column_names:
        if isinstance(rows[column][0], dict):
            dataset = dataset.cast_column(column, datasets.Image())
    return dataset


IDS = {
    "ultraedit": ["7", "8"],
    "magicbrush": ["242679-1", "242679-2"],
    "omniedit": ["task_obj_add_1", "task_obj_add_2"],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MAPPINGS)
def test_foreign_data_get_the_four_fields(tmp_path, name, streaming):
    dataset = foreign(name, tmp_path)
    root = tmp_path if MAPPINGS[name].paths else None
    mapped = map_columns(dataset.to_iterable_dataset() if streaming else dataset, name, root)
    assert list(mapped.features) == ["id", "source", "target", "instruction"]
    samples = list(iter_samples(mapped))
    assert [sample.id for sample in samples] == IDS.get(name, ["0", "1"])
    assert [sample.instruction for sample in samples] == ["make it red", "remove the cat"]
    assert [(sample.source, sample.target) for sample in samples] == [(png(0), png(1)), (png(2), png(3))]
    # And straight from the data's own columns, which tell what they are.
    direct = list(iter_samples(dataset, image_root=root))
    assert [sample.key for sample in direct] == [sample.key for sample in samples]
    assert [sample.id for sample in direct] == [sample.id for sample in samples]


def test_mapping_a_table_does_not_copy_its_pictures(tmp_path):
    foreign("omniedit", tmp_path).save_to_disk(tmp_path / "omniedit")
    dataset = datasets.load_from_disk(tmp_path / "omniedit")
    mapped = map_columns(dataset, "omniedit")
    assert dataset.cache_files[0] in mapped.cache_files
    copied = [file["filename"] for file in mapped.cache_files if file not in dataset.cache_files]
    assert all(b"PNG" not in open(path, "rb").read() for path in copied)


@pytest.mark.parametrize("name", MAPPINGS)
def test_training_reads_mapped_data(tmp_path, name):
    mapped = map_columns(foreign(name, tmp_path), name, tmp_path if MAPPINGS[name].paths else None)
    mapped.save_to_disk(tmp_path / "saved")
    data = load_training_data("edit", dataset_name=str(tmp_path / "saved"))
    assert [data[0]["prompt"], data[1]["prompt"]] == ["make it red", "remove the cat"]
    assert np.array_equal(np.asarray(data[1]["source"]), np.asarray(Image.open(io.BytesIO(png(2)))))


def test_unknown_mappings_and_columns_are_listed(tmp_path):
    dataset = foreign("ultraedit", tmp_path)
    with pytest.raises(ValueError, match="mappings for .*'omniedit'.*, not for 'anyedit'"):
        map_columns(dataset, "anyedit")
    with pytest.raises(
        ValueError, match=r"lack the columns \['source_img'.*have \['clip_sim_source', .*'source_image'"
    ):
        map_columns(dataset, "magicbrush")
    with pytest.raises(ValueError, match="give `image_root`"):
        map_columns(foreign("imgedit", tmp_path), "imgedit")
    with pytest.raises(ValueError, match="one of the columns .* for the target, but have .*'before'"):
        list(iter_samples([{"source": b"", "before": b"", "prompt": ""}]))
    with pytest.raises(ValueError, match="Columns can be named for .* not for \\['picture'\\]"):
        list(iter_samples(dataset, {"picture": "source_image"}))


def test_rows_with_several_pictures_or_unsafe_paths_are_refused(tmp_path):
    rows = {"input_images": [["a.png", "b.png"]], "output_images": [["c.png"]], "prompt": ["join them"]}
    with pytest.raises(ValueError, match="one picture, but there are 2"):
        map_columns(datasets.Dataset.from_dict(rows), "imgedit", tmp_path)
    rows = {"source_image": ["../a.png"], "target_image": ["c.png"], "instruction": ["?"]}
    with pytest.raises(ValueError, match="'../a.png' leads out"):
        map_columns(datasets.Dataset.from_dict(rows), "seed-data-edit", tmp_path)


# Samples for the engine

PAIRS = [("make it red", 0, 1), ("remove the cat", 2, 3), ("a hat", 4, 5)]


def table():
    return datasets.Dataset.from_list(
        [
            {"id": f"e{n}", "source": image(a), "target": image(b), "prompt": text}
            for n, (text, a, b) in enumerate(PAIRS)
        ]
    )


def from_jsonl(folder):
    (folder / "pictures").mkdir()
    rows = []
    for number, (text, *pair) in enumerate(PAIRS):
        for picture in pair:
            (folder / f"pictures/{picture}.png").write_bytes(png(picture))
        paths = {"image_path": f"pictures/{pair[0]}.png", "image_path_target": f"pictures/{pair[1]}.png"}
        rows.append(json.dumps({"id": f"e{number}", "prompt": text, **paths}))
    (folder / "edits.jsonl").write_text("\n".join(rows))
    return folder / "edits.jsonl"


def from_folder_with_jsonl(folder):
    return from_jsonl(folder).parent


def from_jsonl_elsewhere(folder):
    (folder / "elsewhere").mkdir()
    path = from_jsonl(folder)
    path.rename(folder / "elsewhere/edits.jsonl")
    return folder / "elsewhere/edits.jsonl", {"image_root": folder}


def from_parquet(folder):
    table().to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def from_parquet_folder_of_the_engine(folder):
    table().select([0, 1]).to_parquet(folder / "data-00000.parquet")
    table().select([2]).to_parquet(folder / "data-00001.parquet")
    (folder / "dropped.jsonl").write_text('{"id": "x", "reason": "identical"}\n')
    (folder / "summary.json").write_text("{}")
    return folder


def from_hub_layout(folder):
    (folder / "data").mkdir()
    table().to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


def from_saved(folder):
    table().save_to_disk(folder / "saved")
    return folder / "saved"


def from_csv(folder):
    from_jsonl(folder)
    lines = [f"e{n},pictures/{a}.png,pictures/{b}.png,{text}" for n, (text, a, b) in enumerate(PAIRS)]
    (folder / "edits.csv").write_text("\n".join(["id,source,target,prompt", *lines]))
    return folder / "edits.csv", {"image_root": folder}


def from_json(folder):
    """As ShareGPT-4o-Image has it."""
    from_jsonl(folder)
    rows = [
        {
            "id": f"e{n}",
            "input_prompt": text,
            "input_image": [f"pictures/{a}.png"],
            "output_image": f"pictures/{b}.png",
        }
        for n, (text, a, b) in enumerate(PAIRS)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    names = {"source": "input_image", "target": "output_image", "instruction": "input_prompt", "id": "id"}
    return folder / "pairs.json", {"image_root": folder, "mapping": names}


def tar_of(numbers):
    files = {}
    for n in numbers:
        text, a, b = PAIRS[n]
        files |= {f"e{n}.source.png": png(a), f"e{n}.target.png": png(b), f"e{n}.txt": text.encode()}
    return files


def from_tar(folder):
    write_tar(folder / "edits.tar", tar_of([0, 1, 2]))
    return folder / "edits.tar"


def from_tars(folder):
    write_tar(folder / "edits-0.tar", tar_of([0, 1]))
    write_tar(folder / "edits-1.tar", tar_of([2]))
    return folder


def from_picture_folder(folder):
    from_jsonl(folder).unlink()
    rows = [
        {
            "id": f"e{n}",
            "prompt": text,
            "source_file_name": f"pictures/{a}.png",
            "target_file_name": f"pictures/{b}.png",
        }
        for n, (text, a, b) in enumerate(PAIRS)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def from_dim_edit(folder):
    from_jsonl(folder)
    write_parts(folder, tar_gz({f"pictures/{n}.png": png(n) for n in range(6)}), (999, 77))
    for path in (folder / "pictures").iterdir():
        path.unlink()
    return folder


SOURCES = [
    from_jsonl,
    from_folder_with_jsonl,
    from_jsonl_elsewhere,
    from_parquet,
    from_parquet_folder_of_the_engine,
    from_hub_layout,
    from_saved,
    from_csv,
    from_json,
    from_tar,
    from_tars,
    from_picture_folder,
    from_dim_edit,
]


@pytest.mark.parametrize("write", SOURCES)
def test_samples_are_the_same_from_every_source(tmp_path, write, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    made = write(tmp_path / "data")
    path, options = made if isinstance(made, tuple) else (made, {})
    samples = list(read_samples(path, **options))
    assert [sample.id for sample in samples] == ["e0", "e1", "e2"]
    assert [sample.instruction for sample in samples] == [text for text, _, _ in PAIRS]
    assert [(sample.source, sample.target) for sample in samples] == [(png(a), png(b)) for _, a, b in PAIRS]
    assert [sample.id for sample in read_samples(path, limit=2, **options)] == ["e0", "e1"]


def test_pictures_to_be_captioned_need_no_prompt(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    samples = list(read_samples(tmp_path, kind="t2i"))
    assert [(sample.source, sample.target, sample.instruction) for sample in samples] == [
        (None, png(number), "") for number in range(3)
    ]


def test_an_engine_sample_keeps_the_paths_of_its_row(tmp_path):
    sample = next(read_samples(from_jsonl(tmp_path)))
    assert (sample.image_path, sample.image_path_target) == ("pictures/0.png", "pictures/1.png")


def test_a_missing_file_goes_on_to_the_ledger_and_not_unlike_another(tmp_path):
    path = from_jsonl(tmp_path)
    for number in (1, 2, 3):
        (tmp_path / f"pictures/{number}.png").unlink()
    samples = list(read_samples(path))
    assert len({sample.key for sample in samples}) == 3
    assert b"No such file" in samples[0].target and samples[0].source == png(0)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        _ = samples[0].pictures


@pytest.mark.parametrize(
    "line, match",
    [
        ('{"id": "x", "image_path": "pic', "edits.jsonl, line 4 is not JSON.*cut off"),
        ('["x"]\n', "line 4 is no JSON object"),
        (
            '{"id": "x", "image_path": "../../secret.png", "image_path_target": "b.png", "prompt": ""}\n',
            "line 4, source: the path '../../secret.png' leads out",
        ),
    ],
)
def test_a_bad_line_stops_the_samples_and_is_named(tmp_path, line, match):
    path = from_jsonl(tmp_path)
    with open(path, "a") as file:
        file.write(f"\n{line}")
    samples = read_samples(path)
    assert [next(samples).id for _ in range(3)] == ["e0", "e1", "e2"]
    with pytest.raises(ValueError, match=match):
        next(samples)


def test_what_is_nowhere_and_limits_of_none_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no file, no folder and no name"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        read_samples(from_jsonl(tmp_path), limit=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl holds no samples"):
        read_samples(tmp_path / "empty.jsonl")


def memory_of(work):
    """By how many bytes a process of its own grows at most."""

    def measure(pipe):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        pipe.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    return in_a_process(measure)


def test_a_hundred_thousand_rows_are_not_held_in_memory(tmp_path):
    row = {"image_path": "a.png", "image_path_target": "b.png", "prompt": "a long blueprint " * 120}
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    with open(tmp_path / "edits.jsonl", "w") as file:
        file.writelines(json.dumps({"id": str(number), **row}) + "\n" for number in range(100_000))
    assert (tmp_path / "edits.jsonl").stat().st_size > 200e6

    def read():
        assert sum(1 for _ in read_samples(tmp_path / "edits.jsonl", limit=20_000)) == 20_000

    assert memory_of(read) < 20e6
    assert memory_of(lambda: load_dim_edit(tmp_path, cache_dir=tmp_path / "cache")) < 60e6
