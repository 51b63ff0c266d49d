"""Quantised painters and readers, by diffusers' own configs; a library that is not installed skips its tests."""

import copy

import pytest
import torch
import transformers
from diffusers import (
    BitsAndBytesConfig,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    QuantoConfig,
    TorchAoConfig,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMPipeline, DIMTransformer2DModel
from diffusers_dim.loaders.gguf import GGUF_QUANTIZATIONS, save_gguf
from diffusers_dim.models.transformer_dim import DIMDenoisingCache


LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes", "gguf": "gguf"}
# The class of a quantised weight, and of its layer.
KINDS = {
    "torchao": ("Int8Tensor", "Linear"),
    "quanto": ("WeightQBytesTensor", "QLinear"),
    "bitsandbytes int8": ("Int8Params", "Linear8bitLt"),
    "bitsandbytes nf4": ("Params4bit", "Linear4bit"),
    "gguf": ("GGUFParameter", "GGUFLinear"),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers asks for a GPU")
PAINTERS = [
    "torchao",
    "quanto",
    "gguf",
    pytest.param("bitsandbytes int8", marks=needs_gpu),
    pytest.param("bitsandbytes nf4", marks=needs_gpu),
]
READERS = ["torchao", "quanto", "bitsandbytes int8", "bitsandbytes nf4"]


def painters_config(kind: str):
    """diffusers' config, for the transformer."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "quanto":
        return QuantoConfig(weights_dtype="int8")
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def readers_config(kind: str):
    """transformers' config, for the text encoder."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "quanto":
        return transformers.QuantoConfig(weights="int8")
    if kind == "bitsandbytes int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def need(kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind.partition(" ")[0]])


@pytest.fixture(scope="module")
def edit_folder(edit_folder, tmp_path_factory):
    """The golden edit model with a wider reader of random weights: bitsandbytes' blocks on a CPU are 64 wide."""
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    config = copy.deepcopy(pipe.text_encoder.config).to_dict()
    config["text_config"] |= {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    torch.manual_seed(0)
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    connector = DIMConnector(
        hidden_size=128, caption_channels=48, max_sequence_length=pipe.connector.config.max_sequence_length
    )
    components = {**pipe.components, "text_encoder": text_encoder, "connector": connector.eval()}
    folder = tmp_path_factory.mktemp("wide")
    DIMEditPipeline(**components).save_pretrained(folder)
    return folder


@pytest.fixture(params=["edit", "t2i"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def load(tmp_path):
    """Loads a pipeline whose painter, reader or both are quantised: `load(folder, painter="torchao")`."""

    def load(folder, painter: str | None = None, reader: str | None = None) -> DIMPipeline:
        in_channels = DIMTransformer2DModel.load_config(folder, subfolder="transformer")["in_channels"]
        cls = DIMEditPipeline if in_channels == 8 else DIMPipeline
        mapping, components = {}, {}
        if painter == "gguf":
            path = tmp_path / "painter.gguf"
            save_gguf(DIMTransformer2DModel.from_pretrained(folder, subfolder="transformer"), path)
            components["transformer"] = read_gguf(path, folder)
        elif painter is not None:
            mapping["transformer"] = painters_config(painter)
        if reader is not None:
            mapping["text_encoder"] = readers_config(reader)
        if mapping:
            components["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
        pipe = cls.from_pretrained(folder, dtype=torch.float32, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to("cuda" if torch.cuda.is_available() else "cpu")

    return load


def read_gguf(path, folder) -> DIMTransformer2DModel:
    return DIMTransformer2DModel.from_single_file(
        str(path),
        config=str(folder),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )


def quantised(model: torch.nn.Module, kind: str) -> set[str]:
    """Names of the linear layers that are of the `kind`."""
    return {
        name
        for name, module in model.named_modules()
        if (type(getattr(module, "weight", None)).__name__, type(module).__name__) == KINDS[kind]
    }


def linears(model: torch.nn.Module, block_size: int = 1) -> set[str]:
    """Names of the linear layers whose width is a multiple of `block_size`."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % block_size == 0
    }


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("painter", PAINTERS)
def test_painter_is_quantised_and_paints_nearly_the_same(load, folder, paint, painter):
    need(painter)
    pipe, exact = load(folder, painter), load(folder)
    assert quantised(pipe.transformer, painter) == linears(exact.transformer, 32 if painter == "gguf" else 1)
    assert quantised(pipe.text_encoder, painter) == set()
    assert 1e-6 < distance(paint(pipe), paint(exact)) < (0.2 if "nf4" in painter else 0.01)


@pytest.mark.parametrize("reader", READERS)
def test_reader_is_quantised_and_reads_nearly_the_same(load, edit_folder, source, reader):
    need(reader)
    pipe, exact = load(edit_folder, reader=reader), load(edit_folder)
    assert quantised(pipe.text_encoder, reader) >= linears(exact.text_encoder) - {"lm_head"}
    assert quantised(pipe.transformer, reader) == set()
    found, expected = (p.encode_prompt("Make it red.", [source], 32, 32)[0] for p in (pipe, exact))
    assert 1e-6 < distance(found, expected) < (0.3 if "nf4" in reader else 0.03)


@pytest.mark.parametrize("kind", ["torchao", "quanto", *PAINTERS[3:]])
def test_painter_and_reader_are_quantised_at_once(load, edit_folder, paint, kind):
    need(kind)
    pipe = load(edit_folder, painter=kind, reader=kind)
    assert quantised(pipe.transformer, kind) and quantised(pipe.text_encoder, kind)
    latents = paint(pipe)
    assert 1e-6 < distance(latents, paint(load(edit_folder))) < (0.3 if "nf4" in kind else 0.01)
    assert torch.equal(paint(pipe, callback_on_step_end=lambda *_: {}), latents)


@torch.no_grad()
@pytest.mark.parametrize("painter", PAINTERS)
def test_denoising_cache_changes_nothing(load, folder, painter):
    need(painter)
    transformer = load(folder, painter).transformer
    device, generator = transformer.device, torch.Generator().manual_seed(0)
    latents = torch.randn(4, transformer.config.in_channels, 8, 8, generator=generator).to(device)
    condition = torch.randn(2, 9, transformer.config.caption_channels, generator=generator).to(device)
    mask = torch.tensor([[True] * 5 + [False] * 4, [True] * 9], device=device)
    timestep = torch.full((4,), 700.0, device=device)

    def predict(cache):
        inputs = {"encoder_hidden_states": condition, "timestep": timestep, "encoder_attention_mask": mask}
        return transformer(latents, **inputs, denoising_cache=cache).sample

    expected, cache = predict(None), DIMDenoisingCache()
    for _ in range(2):
        assert torch.equal(predict(cache), expected)
    assert cache.is_filled


@pytest.mark.parametrize("painter", PAINTERS)
def test_quantised_projections_are_not_fused(load, edit_folder, painter):
    need(painter)
    pipe = load(edit_folder, painter)
    with pytest.raises(ValueError, match="Only plain linear layers can be fused, but `to_q` is a .* quantised"):
        pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("painter", PAINTERS)
def test_adapter_goes_onto_a_quantised_painter(load, edit_folder, paint, painter, tmp_path):
    need(painter)
    exact = load(edit_folder)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    exact.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(exact.transformer)
    DIMEditPipeline.save_lora_weights(tmp_path / "adapter", transformer_lora_layers=layers)

    pipe = load(edit_folder, painter)
    before = paint(pipe)
    pipe.load_lora_weights(tmp_path / "adapter")
    adapted = paint(pipe)
    assert distance(adapted, paint(exact)) < 0.1 * distance(adapted, before)
    assert torch.equal(paint(pipe, attention_kwargs={"scale": 0.0}), before)
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe), before)


@pytest.mark.parametrize(
    ("painter", "reader"),
    [
        ("torchao", "torchao"),
        ("quanto", None),
        (None, "bitsandbytes int8"),
        (None, "bitsandbytes nf4"),
        pytest.param("bitsandbytes int8", "bitsandbytes int8", marks=needs_gpu),
        pytest.param("bitsandbytes nf4", "bitsandbytes nf4", marks=needs_gpu),
    ],
)
def test_quantised_pipeline_is_saved_and_loaded(load, edit_folder, paint, tmp_path, painter, reader):
    need(painter or reader)
    pipe = load(edit_folder, painter, reader)
    pipe.save_pretrained(tmp_path / "saved")  # before it paints: bitsandbytes rounds its scales at first use on a CPU
    loaded = load(tmp_path / "saved")
    for name, kind in (("transformer", painter), ("text_encoder", reader)):
        if kind is not None:
            assert quantised(getattr(loaded, name), kind) == quantised(getattr(pipe, name), kind)
    torch.testing.assert_close(paint(loaded), paint(pipe), atol=1e-5, rtol=0)


# GGUF files


@pytest.fixture
def transformer(edit_folder) -> DIMTransformer2DModel:
    return DIMTransformer2DModel.from_pretrained(edit_folder, subfolder="transformer")


@pytest.mark.parametrize("quantization", GGUF_QUANTIZATIONS)
def test_gguf_file_holds_linear_layers_quantised_and_the_rest_in_full(
    transformer, edit_folder, tmp_path, quantization
):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    path = tmp_path / "painter.gguf"
    save_gguf(transformer, path, quantization)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds.keys() == transformer.state_dict().keys()
    layers = {f"{name}.weight" for name in linears(transformer, 32)}
    assert {name for name, kind in kinds.items() if kind == quantization} == layers
    convolutions = {
        f"transformer_blocks.{i}.ff.conv_{part}.weight" for i in range(2) for part in ("inverted", "depth", "point")
    }
    assert {name for name, kind in kinds.items() if kind == "F16"} == convolutions | {"patch_embed.proj.weight"}

    read = read_gguf(path, edit_folder)
    assert quantised(read, "gguf") == linears(transformer, 32)
    bits = int(quantization[1])
    for name, weight in transformer.state_dict().items():
        found = read.state_dict()[name]
        if name in layers:
            error = (dequantize_gguf_tensor(found) - weight).abs().max()
            assert error < 1.1 * weight.abs().max() / 2 ** (bits - 1)
        else:
            torch.testing.assert_close(found, weight, atol=1e-7, rtol=1e-3)


def test_layer_that_blocks_do_not_divide_is_written_in_full(tmp_path):
    gguf = pytest.importorskip("gguf")
    narrow = DIMTransformer2DModel(
        num_layers=1,
        num_attention_heads=1,
        num_cross_attention_heads=1,
        cross_attention_head_dim=32,
        cross_attention_dim=32,
        caption_channels=40,
    )
    save_gguf(narrow, tmp_path / "narrow.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "narrow.gguf").tensors}
    assert kinds["caption_projection.linear_1.weight"] == "F32"
    assert kinds["caption_projection.linear_2.weight"] == "Q8_0"
    narrow.save_pretrained(tmp_path / "narrow" / "transformer")
    read = read_gguf(tmp_path / "narrow.gguf", tmp_path / "narrow")
    assert torch.equal(read.caption_projection.linear_1.weight, narrow.caption_projection.linear_1.weight)


def test_gguf_file_of_half_precision_is_that_of_full(transformer, edit_folder, tmp_path):
    pytest.importorskip("gguf")
    transformer.to(torch.bfloat16)
    save_gguf(transformer, tmp_path / "half.gguf")
    save_gguf(transformer.float(), tmp_path / "full.gguf")
    assert (tmp_path / "half.gguf").read_bytes() == (tmp_path / "full.gguf").read_bytes()


def test_unknown_gguf_quantization_is_refused(transformer, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"`quantization` has to be one of \['Q8_0', .*\], but is 'Q4_K'"):
        save_gguf(transformer, tmp_path / "painter.gguf", "Q4_K")
    assert not (tmp_path / "painter.gguf").exists()


def test_painter_that_is_not_plain_is_not_written(transformer, load, edit_folder, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "again.gguf"
    pipe = load(edit_folder, "gguf")
    with pytest.raises(ValueError, match="Only a plain .* is quantised: its weight is a GGUFParameter"):
        save_gguf(pipe.transformer, path)
    transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"Only a plain .* differs in .*to_qkv.*: unload adapters and unfuse"):
        save_gguf(transformer, path)
    transformer.unfuse_qkv_projections()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"Only a plain .* differs in .*lora_A.*: unload adapters and unfuse"):
        save_gguf(transformer, path)
    assert not path.exists()
    transformer.unload_lora()
    save_gguf(transformer, path)
    assert path.exists()
