import argparse
import json
import pickle

import pytest
import torch
from PIL import Image

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMPipeline
from diffusers_dim.data import UnreadableSampleError
from diffusers_dim.tiny import sample_edits
from diffusers_dim.training import (
    DIMTrainingModel,
    PrecomputedDataset,
    collate_encoded,
    encode_samples,
    make_placeholder,
)
from diffusers_dim.training.conditions import save_shard


CPU = torch.device("cpu")
PROMPTS = ("red", "make the small circle blue", "move it", "remove the large green square now")


@pytest.fixture(scope="module")
def pipes(edit_folder, t2i_folder):
    return {"edit": DIMEditPipeline.from_pretrained(edit_folder), "t2i": DIMPipeline.from_pretrained(t2i_folder)}


def make_samples(kind):
    samples = [
        {"id": str(index), "prompt": prompt, "source": edit.source, "target": edit.target}
        for index, (prompt, edit) in enumerate(zip(PROMPTS, sample_edits(len(PROMPTS), seed=1)))
    ]
    return samples if kind == "edit" else [{k: v for k, v in sample.items() if k != "source"} for sample in samples]


@pytest.mark.parametrize("kind", ["edit", "t2i"])
def test_encoded_samples_are_what_the_published_code_saw(pipes, request, kind):
    golden = request.getfixturevalue(f"golden_{kind}")
    picture = Image.open(golden.path / "source.png").convert("RGB")
    sample = {"prompt": golden.settings["prompt"], "target": picture}
    if kind == "edit":
        sample["source"] = picture
    (item,) = encode_samples(pipes[kind], [sample], 64, 64)
    hidden_states = golden.tensors["hidden"][golden.tensors["user_mask"]]
    torch.testing.assert_close(item["hidden_states"], hidden_states, rtol=1e-4, atol=1e-5)
    for name in ("latents", "image_latents") if kind == "edit" else ("latents",):
        torch.testing.assert_close(item[name], golden.tensors["z_src"][0], rtol=1e-4, atol=1e-5)
    assert ("image_latents" in item) == (kind == "edit")


@pytest.mark.parametrize("kind", ["edit", "t2i"])
def test_samples_are_encoded_together_as_alone(pipes, kind):
    samples = make_samples(kind)
    for sample, item in zip(samples, encode_samples(pipes[kind], samples, 64, 96), strict=True):
        (alone,) = encode_samples(pipes[kind], [sample], 64, 96)
        assert alone.keys() == item.keys()
        for name in alone:
            torch.testing.assert_close(item[name], alone[name], rtol=1e-4, atol=1e-5)
        assert item["latents"].shape == (4, 16, 24)


def test_edit_samples_can_be_encoded_by_a_text_to_image_pipeline(pipes):
    (item,) = encode_samples(pipes["t2i"], make_samples("edit")[:1], 64, 64)
    assert item["image_latents"].shape == item["latents"].shape
    assert len(item["hidden_states"]) > 6  # the picture's tokens


@pytest.mark.parametrize(("limit", "rows", "kept"), [(3, 512, 3), (512, 5, 5), (4, 5, 4)])
def test_last_tokens_are_kept_that_the_null_condition_has_rows_for(pipes, limit, rows, kept):
    sample = make_samples("t2i")[3:]
    (whole,) = encode_samples(pipes["t2i"], sample, 64, 64)
    pipe = DIMPipeline(**pipes["t2i"].components | {"connector": DIMConnector(32, 48, rows)})
    (cut,) = encode_samples(pipe, sample, 64, 64, limit)
    assert torch.equal(cut["hidden_states"], whole["hidden_states"][-kept:])


def test_hidden_states_keep_the_text_encoders_dtype_and_latents_are_float32(t2i_folder):
    pipe = DIMPipeline.from_pretrained(t2i_folder, transformer=None, connector=None)
    pipe.text_encoder.to(torch.bfloat16)
    (item,) = encode_samples(pipe, make_samples("t2i")[:1], 64, 64)
    assert {name: tensor.dtype for name, tensor in item.items()} == {
        "hidden_states": torch.bfloat16,
        "latents": torch.float32,
    }
    assert not item["hidden_states"].requires_grad


def test_no_samples_are_encoded_to_none(pipes):
    assert encode_samples(pipes["edit"], [], 64, 64) == []


def make_item(tokens):
    return {"id": "a", "hidden_states": torch.full((tokens, 8), float(tokens)), "latents": torch.zeros(4, 2, 2)}


def test_batch_is_padded_on_the_right_under_a_mask():
    batch = collate_encoded([make_item(2), make_item(3)], CPU)
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["hidden_states"][:, :, 0].tolist() == [[2, 2, 0], [3, 3, 3]]
    assert batch["latents"].shape == (2, 4, 2, 2)
    assert batch["weights"].tolist() == [1, 1]
    assert "image_latents" not in batch


def test_batch_without_padding_has_no_mask():
    assert "attention_mask" not in collate_encoded([make_item(3), make_item(3)], CPU)


@pytest.mark.parametrize("kind", ["edit", "t2i"])
def test_placeholder_can_be_trained_on_and_counts_nothing(pipes, kind):
    pipe = pipes[kind]
    placeholder = make_placeholder(pipe.connector.config, pipe.transformer.config, 64, 96, pipe.vae_scale_factor)
    batch = collate_encoded([], CPU, placeholder)
    weights = batch.pop("weights")
    assert weights.tolist() == [0]
    (item,) = encode_samples(pipe, make_samples(kind)[:1], 64, 96)
    assert {name: row.shape[1:] for name, row in placeholder.items() if name != "hidden_states"} == {
        name: row.shape[1:] for name, row in item.items() if name != "hidden_states"
    }
    model = DIMTrainingModel(pipe.connector, pipe.transformer)
    losses = model(
        **batch,
        noise=torch.randn(batch["latents"].shape),
        timesteps=torch.tensor([500]),
        dropped=torch.tensor([False]),
    )
    (gradient,) = torch.autograd.grad((losses * weights).sum(), pipe.connector.linear_1.weight)
    assert losses.isfinite().all()
    assert not gradient.any()


def test_items_need_no_placeholder_but_nothing_does():
    with pytest.raises(ValueError, match="needs items, or a placeholder"):
        collate_encoded([], CPU)


FACTS = {
    "kind": "edit",
    "samples": 5,
    "shard_size": 2,
    "resolution": 64,
    "aspect_ratio_bucketing": False,
    "max_sequence_length": 512,
    "hidden_size": 32,
    "latent_channels": 4,
    "vae_scale_factor": 4,
    "scaling_factor": 0.41407,
}


def make_row(index, dtype=torch.float32):
    row = {
        "id": f"sample {index}",
        "length": 10 + index,
        "height": 60 + index,
        "width": 80,
        "fields": {"kind": "move"},
    }
    if index == 3:
        return {**row, "reason": "the file is cut short"}
    if index == 4:
        return {**row, "height": None, "width": None, "reason": "there is no such file"}
    generator = torch.Generator().manual_seed(index)
    shapes = {"hidden_states": (3 + index, 32), "latents": (4, 16, 16), "image_latents": (4, 16, 16)}
    return {**row, **{name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}}


def write_folder(folder, facts=FACTS, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts))
    for number in (2, 0, 1):
        save_shard(folder, number, [make_row(index, dtype) for index in range(2 * number, min(2 * number + 2, 5))])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("conditions") / "edit")


@pytest.mark.parametrize("way", ["as it is", "pickled"])
def test_kept_samples_come_back_in_the_datas_order(folder, way):
    dataset = PrecomputedDataset(folder)
    if way == "pickled":  # as a worker that is not forked gets it
        dataset = pickle.loads(pickle.dumps(dataset))
    assert (len(dataset), dataset.kind) == (5, "edit")
    for index in range(3):
        row, item = make_row(index), dataset[index]
        assert (item["id"], item["kind"]) == (row["id"], "move")
        for name in ("hidden_states", "latents", "image_latents"):
            assert torch.equal(item[name], row[name])
        assert dataset.size(index) == (60 + index, 80)
        assert (dataset.id(index), dataset.length(index)) == (f"sample {index}", 10 + index)


def test_folder_holds_whole_files_alone(folder):
    names = [f"shard-{number:05}.{kind}" for number in range(3) for kind in ("jsonl", "safetensors")]
    assert sorted(path.name for path in folder.iterdir()) == ["facts.json", *names]


def test_text_to_image_samples_have_no_source(tmp_path):
    dataset = PrecomputedDataset(write_folder(tmp_path, FACTS | {"kind": "t2i"}))
    assert dataset.kind == "t2i"
    assert "image_latents" not in dataset[0]


def test_rounded_latents_are_float32_again(tmp_path):
    item = PrecomputedDataset(write_folder(tmp_path, dtype=torch.bfloat16))[1]
    assert torch.equal(item["latents"], make_row(1)["latents"].bfloat16().float())
    assert (item["latents"].dtype, item["image_latents"].dtype) == (torch.float32, torch.float32)
    assert item["hidden_states"].dtype == torch.bfloat16


def test_unreadable_samples_keep_their_place_and_reason(folder):
    dataset = PrecomputedDataset(folder)
    for index, reason in ((3, "the file is cut short"), (4, "there is no such file")):
        with pytest.raises(UnreadableSampleError) as error:
            dataset[index]
        assert (error.value.id, error.value.reason) == (f"sample {index}", reason)
        assert dataset.length(index) == 10 + index
    assert dataset.size(3) == (63, 80)  # its header could be read, as online
    with pytest.raises(UnreadableSampleError, match="there is no such file"):
        dataset.size(4)


def test_first_samples_alone(folder):
    dataset = PrecomputedDataset(folder, max_samples=3)
    assert [dataset.id(index) for index in range(len(dataset))] == ["sample 0", "sample 1", "sample 2"]


def test_shard_without_its_manifest_is_not_finished(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "shard-00001.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, such as shard-00001.safetensors: run precompute"):
        PrecomputedDataset(tmp_path)


def test_manifest_without_its_tensors_is_told_at_once(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, such as shard-00002.safetensors"):
        PrecomputedDataset(tmp_path)


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no facts.json: it is no folder of precompute_conditions.py"):
        PrecomputedDataset(tmp_path)


@pytest.fixture(scope="module")
def painters(pipes):
    frozen = {"text_encoder": None, "processor": None, "vae": None}
    return {kind: type(pipe)(**pipe.components | frozen) for kind, pipe in pipes.items()}


def options(model, **changed):
    usual = {"resolution": 64, "aspect_ratio_bucketing": False, "max_sequence_length": 8192, "revision": None}
    return argparse.Namespace(pretrained_model_name_or_path=model, **usual | changed)


def test_samples_of_the_models_own_settings_pass(folder, painters, edit_folder):
    PrecomputedDataset(folder).check(painters["edit"], options(edit_folder))


@pytest.mark.parametrize(
    ("facts", "changed", "message"),
    [
        ({"kind": "t2i"}, {}, "kind t2i, not edit"),
        ({"hidden_size": 2048}, {}, "hidden_size 2048, not 32"),
        ({"latent_channels": 32}, {}, "latent_channels 32, not 4"),
        ({"vae_scale_factor": 32}, {}, "vae_scale_factor 32, not 4"),
        ({"scaling_factor": 1.0}, {}, "scaling_factor 1.0, not 0.41407"),
        ({}, {"resolution": 128}, "resolution 64, not 128"),
        ({}, {"aspect_ratio_bucketing": True}, "aspect_ratio_bucketing False, not True"),
        ({"max_sequence_length": 5}, {}, "max_sequence_length 5, not 512"),
        ({}, {"max_sequence_length": 4}, "max_sequence_length 512, not 4"),
        ({"kind": "t2i"}, {"resolution": 96}, "kind t2i, not edit; resolution 64, not 96"),
    ],
)
def test_samples_of_other_settings_are_refused(tmp_path, painters, edit_folder, facts, changed, message):
    dataset = PrecomputedDataset(write_folder(tmp_path, FACTS | facts))
    with pytest.raises(ValueError, match=f"{tmp_path} was made for {message}: train as it was made"):
        dataset.check(painters["edit"], options(edit_folder, **changed))


@pytest.mark.parametrize(("made", "asked"), [(6, 512), (512, 5), (5, 5)])
def test_another_limit_that_cuts_nothing_is_as_good(tmp_path, painters, edit_folder, made, asked):
    dataset = PrecomputedDataset(write_folder(tmp_path, FACTS | {"max_sequence_length": made}))
    dataset.check(painters["edit"], options(edit_folder, max_sequence_length=asked))
