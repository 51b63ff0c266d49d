"""The script at tiny size: what it measures, and what it says of what it cannot."""

import dataclasses
import json
from statistics import median

import pytest
import torch

from bench import main
from measure import Machine, Unmeasured
from presets import PRESETS
from sections import MEMORY_OPTIONS, Bench, bench_edit, peak_memory, time_call, time_kernels


SECTIONS = ("call", "step", "edit", "vlm", "vae", "kernels", "memory", "growth", "approximate")


@pytest.fixture(scope="module")
def bench() -> Bench:
    machine = Machine(flops_per_second=1e11, bytes_per_second=1e10)
    return Bench(PRESETS["tiny"], torch.device("cpu"), torch.float32, machine, ["ours", "stock"], edits=1)


def comparisons(results: dict) -> list[dict]:
    """All parts of a JSON that compare variants."""
    found = [results] if "variants" in results else []
    return found + [item for part in results.values() if isinstance(part, dict) for item in comparisons(part)]


def test_each_section_tells_how_it_was_measured(tiny):
    assert tuple(tiny) == SECTIONS
    for section in tiny.values():
        assert section["command"].startswith("python benchmarks/bench.py --preset tiny --runs 1")
        assert section["versions"]["torch"] == torch.__version__
        assert section["threads"] >= 1 and section["device"] and section["dtype"] == "float32"
        assert min(section["machine"].values()) > 0


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in ("kernels", "memory", "approximate")])
def test_samples_medians_and_ratios_agree(tiny, section):
    found = comparisons(tiny[section]["results"])
    assert found
    for comparison in found:
        variants = comparison["variants"]
        for timing in variants.values():
            assert min(timing["seconds"]) > 0
            assert timing["median_seconds"] == pytest.approx(median(timing["seconds"]), rel=1e-4)
            if "stock" in variants:
                ratio = variants["stock"]["median_seconds"] / timing["median_seconds"]
                assert timing["times_faster_than_stock"] == pytest.approx(ratio, rel=1e-4)
            if "floor" in comparison:
                ratio = timing["median_seconds"] / comparison["floor"]["seconds"]
                assert timing["times_the_floor"] == pytest.approx(ratio, rel=1e-4)


def test_what_needs_a_gpu_says_so_on_a_cpu(tiny):
    assert "CPU" in tiny["kernels"]["results"]["unmeasured"]
    assert "CPU" in tiny["memory"]["results"]["unmeasured"]


@pytest.mark.parametrize("kind", ["text_to_image", "edit"])
def test_calls_of_both_sides_give_the_same_latents(tiny, kind):
    result = tiny["call"]["results"][kind]
    assert result["latents_standard_deviation"] > 0.1
    assert result["largest_difference_to_stock"]["ours"] < 1e-4


def test_growth_has_all_cells_of_the_table(tiny):
    results = tiny["growth"]["results"]
    for axis, values in PRESETS["full"].growth.items():
        cells = results[axis]["cells"]
        assert {str(value) for value in values} <= cells.keys()
        assert "variants" in cells[str(PRESETS["tiny"].growth[axis][0])]
    assert results["size"]["cells"]["4096"] == {"unmeasured": "too large for this preset"}


def test_approximations_are_timed_where_they_do_not_depend_on_weights(tiny):
    variants = tiny["approximate"]["results"]["variants"]
    assert "trained weights" in variants["mag_cache"]["unmeasured"]
    assert variants["taylor_seer_2"]["seconds"]
    assert variants["exact"]["picture_forwards"] == {
        "transformer": 2 * 3,  # branches, steps
        "self_attention": 2 * 3 + 3,  # in the first of two layers branches do not differ
        "cross_attention": 2 * 2 * 3,
        "conv": 2 * 2 * 3,
    }


def test_approximations_of_the_embedded_model_leave_out_work_and_change_pictures(results):
    variants = json.loads((results / "embedded.json").read_text())["approximate"]["results"]["variants"]
    exact = variants.pop("exact")
    assert exact["mean_psnr"] is None and exact["largest_difference"] == 0
    assert exact["picture_forwards"]["transformer"] == 2 * 6  # branches, steps
    for name in ("first_block_cache_0.2", "taylor_seer_4", "half_of_the_steps", "guidance_interval_0_0.5"):
        assert variants[name]["share_of_exact_flops"] < 0.9
        assert 10 < variants[name]["mean_psnr"] < 80
        assert 0 <= variants[name]["success"] <= 1
    assert variants["half_of_the_steps"]["picture_forwards"]["transformer"] == 2 * 3
    assert variants["guidance_interval_0_0.5"]["picture_forwards"]["transformer"] == 2 * 3 + 3
    attentions = [variants[name]["picture_forwards"]["self_attention"] for name in ("taylor_seer_4", "mag_cache")]
    assert attentions[0] < exact["picture_forwards"]["self_attention"] >= attentions[1]


def test_a_section_run_alone_leaves_the_others(results, tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text((results / "tiny.json").read_text())
    monkeypatch.setattr("sys.argv", ["bench.py", "vae", "--preset", "tiny", "--runs", "2", "--results", str(tmp_path)])
    main()
    before, after = (json.loads((folder / "tiny.json").read_text()) for folder in (results, tmp_path))
    assert after["vae"]["runs"] == 2
    assert {**after, "vae": before["vae"]} == before


def test_unknown_section_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "calls"])
    with pytest.raises(SystemExit):
        main()
    assert "hold ['calls']" in capsys.readouterr().err


def test_preset_without_a_vision_language_model_has_no_whole_edit(bench):
    with pytest.raises(Unmeasured, match="no vision-language model"):
        bench_edit(dataclasses.replace(bench, preset=PRESETS["cpu"]))


def test_latents_that_are_not_finite_are_not_timed(bench):
    broken = dataclasses.replace(bench.preset, transformer={**bench.preset.transformer, "norm_eps": float("nan")})
    result = time_call(dataclasses.replace(bench, preset=broken), edits=False)
    assert result["variants"]["ours"] == {"unmeasured": "the latents are not finite"}


def test_every_kernel_is_timed_forward_and_backward(bench):
    # On a CPU kernel and definition are one; what runs here is the timing.
    timings = time_kernels(bench, compiled=False)
    assert len(timings) == 7
    for timing in timings.values():
        for direction in ("forward", "forward_and_backward"):
            assert all(variant["seconds"] for variant in timing[direction]["variants"].values())


@pytest.mark.parametrize("option", ["plain", "float8_weights", "model_offload", "group_offload", "vae_tiling_4096"])
def test_memory_options_edit(bench, option):
    prepare, size = MEMORY_OPTIONS[option]
    assert peak_memory(bench, prepare, size and 128)["seconds"]
