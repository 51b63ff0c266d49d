"""Training steps against a plain loop over stock parts: equal results, shared weights, counted work, found memory."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import report
import training
from diffusers_dim.training import training_flops
from measure import Unmeasured
from training import (
    TRAINING_PRESETS,
    VARIANTS,
    Trainer,
    TrainingBench,
    bench_equality,
    bench_largest_batch,
    compare,
    find_largest_batch,
    largest_that_fits,
    state_bytes,
    time_steps,
)


UNCOMPILED = [name for name, variant in VARIANTS.items() if not variant.compiled]


@pytest.fixture(scope="module")
def bench() -> TrainingBench:
    preset = dataclasses.replace(TRAINING_PRESETS["tiny"], runs=1)
    return TrainingBench(preset, torch.device("cpu"), torch.float32, 1e11, UNCOMPILED, threads=1)


@pytest.fixture(scope="module")
def training_results(tmp_path_factory) -> Path:
    """Results of the tiny preset under the name that the report looks for."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--preset", "tiny", "--name", "cpu", "--runs", "3", "--results", str(folder), "--largest_batch", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["training.py", *arguments, "--variants", "ours_checkpointing"])
        training.main()
    return folder


def test_variants_have_the_losses_and_gradients_of_stock_parts(bench):
    results = bench_equality(bench)["float32"]
    assert list(results) == UNCOMPILED
    for differences in results.values():
        assert differences["loss"] < 1e-5
        assert differences["gradient"] < 1e-5


def test_difference_to_stock_is_seen(bench):
    trainer = Trainer(bench)
    batch = bench.batch(2)
    expected = trainer.losses("stock", batch)
    assert not torch.allclose(trainer.losses("ours", batch | {"dropped": ~batch["dropped"]}), expected, rtol=1e-4)


def test_variants_train_the_very_same_weights(bench):
    trainer = Trainer(bench)
    trained = {id(parameter) for parameter in trainer.parameters}
    for name in UNCOMPILED:
        assert {id(parameter) for parameter in trainer.model(name).parameters()} == trained


def test_a_step_of_each_side_moves_the_weights(bench):
    trainer = Trainer(bench)
    trainer.make_moments()
    for name in ("stock", "ours"):
        before = trainer.transformer.proj_out.weight.detach().clone()
        trainer.step(name, bench.batch(1))
        assert not torch.equal(trainer.transformer.proj_out.weight, before)
        assert all(parameter.grad is None for parameter in trainer.parameters)


def test_both_sides_share_one_set_of_moments(bench):
    trainer = Trainer(bench)
    trainer.make_moments()
    for parameter in trainer.parameters:
        ours, stock = (trainer.optimizers[side].state[parameter] for side in (False, True))
        assert ours["exp_avg"] is stock["exp_avg"] and ours["exp_avg_sq"] is stock["exp_avg_sq"]


@pytest.mark.parametrize("size, longest", [(64, 24), (128, 24 + 21)])  # 2 x 2 and 5 x 5 vision tokens
def test_conditions_of_a_batch_are_padded_to_the_longest(bench, size, longest):
    batch = bench.batch(4, size)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == bench.lengths(4, size)
    assert batch["hidden_states"].shape[1] == lengths[0] == longest
    assert len(set(lengths)) == 4 and lengths[-1] >= longest - 20 // 2  # of 20 text tokens half at least


def test_work_of_a_step_does_not_count_padding(bench):
    preset = bench.preset
    expected = sum(training_flops(preset.transformer, preset.connector, 2, 2, tokens) for tokens in (24, 19))
    assert bench.lengths(2, 64) == [24, 19]
    assert bench.flops(2) == expected


@pytest.mark.parametrize("ceiling", [1, 3, 16, 100])
@pytest.mark.parametrize("threshold", [0, 1, 2, 5, 15, 16, 17, 63, 200])
def test_search_ends_at_the_largest_batch_or_a_tenth_below(threshold, ceiling):
    probes = []

    def fits(number: int) -> bool:
        probes.append(number)
        return number <= threshold

    found, best = largest_that_fits(fits, ceiling), min(threshold, ceiling)
    assert found <= best <= found + max(1, int(0.1 * found)) - (found < 20)
    assert max(probes) <= ceiling and len(probes) == len(set(probes)) <= 14


@pytest.mark.parametrize("memory, batch, capped", [(10**12, 3, True), (1, 0, False)])
def test_largest_batch_is_that_of_the_memory(bench, memory, batch, capped):
    found = find_largest_batch(bench, "ours", memory)
    assert (found["batch"], found["capped"]) == (batch, capped)
    assert all(peak > 10**7 for peak in found["probes"].values())


def test_memory_has_to_be_given_on_a_cpu(bench):
    with pytest.raises(Unmeasured, match="no memory was given"):
        bench_largest_batch(dataclasses.replace(bench, preset=TRAINING_PRESETS["full"]))


def test_loss_that_is_not_finite_is_not_timed(bench):
    broken = dataclasses.replace(bench.preset, transformer={**bench.preset.transformer, "norm_eps": float("nan")})
    bench = dataclasses.replace(bench, preset=broken)
    assert time_steps(bench, Trainer(bench), {"ours": 1})["ours"] == {"unmeasured": "the loss is not finite"}


def test_ratios_are_by_the_sample_to_the_faster_plain_loop():
    timings = {
        "stock": {"median_seconds": 4.0, "batch": 2},
        "stock_checkpointing": {"median_seconds": 6.0, "batch": 4},
        "ours": {"median_seconds": 6.0, "batch": 8},
        "ours_checkpointing": {"unmeasured": "not even one sample fits 1 GB"},
    }
    variants = compare(timings)["variants"]
    assert variants["ours"]["times_faster_than_stock"] == 2.0
    assert variants["stock"]["times_faster_than_stock"] == 0.75
    assert "times_faster_than_stock" not in variants["ours_checkpointing"]


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_counted_state_is_what_the_optimizer_keeps(bench, name):
    trainer = Trainer(bench, name)
    trainer.step("ours", bench.batch(1))
    state = [value for states in trainer.optimizers[False].state.values() for value in states.values()]
    kept = sum(value.nbytes for value in state if torch.is_tensor(value) and value.ndim)
    assert state_bytes(bench.preset, name) == kept


def test_counted_state_of_the_published_model():
    counted = {name: state_bytes(TRAINING_PRESETS["full"], name) for name in ("adamw", "adamw8bit", "came")}
    assert counted["adamw"] == pytest.approx(8 * 1.634e9, rel=0.01)
    assert counted["adamw8bit"] == pytest.approx(counted["adamw"] / 4, rel=0.03)
    assert counted["came"] == pytest.approx(counted["adamw"] / 2, rel=0.01)


def test_each_section_tells_how_it_was_measured(training_results):
    sections = json.loads((training_results / "training_cpu.json").read_text())
    assert tuple(sections) == ("equality", "step", "largest_batch", "table", "optimizers")
    for section in sections.values():
        assert section["command"].startswith("python benchmarks/training.py --preset tiny")
        assert section["versions"]["torch"] == torch.__version__
        assert section["dtype"] == "bfloat16" and len(section["load_average"]) == 2
        assert "unmeasured" not in section["results"]


def test_largest_batch_is_searched_in_a_process_of_its_own(training_results):
    results = json.loads((training_results / "training_cpu.json").read_text())["largest_batch"]["results"]
    for timing in results["variants"].values():
        assert timing["batch"] == 2 and timing["capped"]
        assert 10**8 < timing["peak_bytes"] <= results["memory"]
        assert len(timing["seconds"]) == len(timing["processor_seconds"]) == 3


def test_tables_hold_what_was_measured(training_results):
    text = report.training_report(training_results)
    variants = json.loads((training_results / "training_cpu.json").read_text())["step"]["results"]["variants"]
    ours = variants["ours_checkpointing"]
    line = next(line for line in text.splitlines() if line.startswith("| CPU: ours, gradient checkpointing |"))
    assert report.seconds(ours["seconds_a_sample"]) in text
    assert line.count("|") > 4
    assert "| CPU: 64 px, batch 2, ours, gradient checkpointing | 24 |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_tables_are_unmeasured_without_results(tmp_path):
    text = report.training_report(tmp_path)
    tables = [block.splitlines()[2:] for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    assert {cell.strip() for rows in tables for row in rows for cell in row.split("|")[2:-1]} == {"unmeasured"}


def test_page_holds_the_report_of_the_committed_results():
    block = report.TRAINING_PAGE.read_text().split(report.TRAINING_BEGIN)[1].split(report.TRAINING_END)[0]
    assert block.strip() == report.training_report()


def test_unknown_section_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py", "steps"])
    with pytest.raises(SystemExit):
        training.main()
    assert "hold ['steps']" in capsys.readouterr().err
