"""SmolLM2-135M from its package: the weights and tokenizer of the file, and no request to a network."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tlcoupling as tlc
from tlcoupling.models import load as tlc_models
from tlcoupling.models import smollm2 as tlc_smollm2

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
    assert packaged.read_bytes() == (Path(__file__).parents[1] / "data" / "prompts.json").read_bytes()
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
