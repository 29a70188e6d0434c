"""The table of models in docs/models.md: what is measured of every architecture of the installed TransformerLens.

Each architecture that has a class in transformers is built small and random, booted as a bridge, and measured: which
sublayers, by which engine, or why not. Each Jacobian is held against central differences of the whole real model, whose
stream is moved and read through its own modules. An architecture runs in a process of its own, with limits on memory
and time.

    PIP_NO_INDEX=1 python benchmarks/architectures.py            # prints the table
    PIP_NO_INDEX=1 python benchmarks/architectures.py --write    # writes it into docs/models.md
    PIP_NO_INDEX=1 python benchmarks/architectures.py MambaForCausalLM JambaForCausalLM
"""

from __future__ import annotations

import importlib.machinery
import inspect
import multiprocessing
import resource
import signal
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.errors import TLCouplingError, UnsupportedModelError
from tlcoupling.forward.bare import _no_tokenizer
from tlcoupling.forward.offline import booted
from tlcoupling.jacobian.engine import JacobianEngine

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
MEMORY, SECONDS = 6 << 30, 300

WIDTH, LAYERS, HEADS, VOCABULARY, WINDOW = 32, 4, 4, 60, 4
TOKENS = torch.tensor([7, 23, 3, 41, 11, 9, 30, 17, 5])
DECODER_TOKENS = torch.tensor([0, 12, 3, 41, 8, 9, 30, 17, 5])
STACKS = ("encoder", "decoder")
MEASURED = ("block", "attn", "mixer", "cross_attn", "mlp", "heads")
# (src, dest): at the first position, at a later one, inside a window and outside of it; backwards where that is a pair.
PAIRS = ((0, 0), (5, 5), (4, 6), (0, 8))
BACKWARDS = ((6, 4),)
STEPS = (3e-2, 1e-2, 3e-3, 1e-3)  # HuggingFace's code casts to float32 inside; kinks of ReLUs and routers need several
TOLERANCE = 0.03  # of a product of a Jacobian against the nearest difference, relative
NOTHING = 2e-4  # and absolute, for a direction of length 1

_BY_NAME: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("attention_hidden_size",), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "vocab_size": VOCABULARY,
    "head_dim": 8,
    "d_kv": 8,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4, mamba_expand=2, mamba_n_groups=1)
_LATENT = dict(
    q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4
)
_GROUPS = dict(n_group=1, topk_group=1)
_IMAGE = dict(image_size=12, patch_size=4)
_WAVE = dict(
    conv_dim=(32, 32),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)
_SPECIAL: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": dict(max_length=32, num_mel_bins=24, patch_size=8, frequency_stride=8, time_stride=8),
    "BambaForCausalLM": dict(_MAMBA2, attn_layer_indices=[2]),
    "CodeGenForCausalLM": dict(rotary_dim=4),
    "DeepseekV2ForCausalLM": dict(_LATENT, **_GROUPS, first_k_dense_replace=2),
    "DeepseekV3ForCausalLM": dict(_LATENT, **_GROUPS, first_k_dense_replace=2),
    "DeiTForImageClassification": _IMAGE,
    "DeiTModel": _IMAGE,
    "Emu3ForConditionalGeneration": dict(
        vocabulary_map={"<image>": 50, "<|extra_200|>": 51},
        vq_config=dict(
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            attn_resolutions=[3],
            codebook_size=8,
            embed_dim=8,
            latent_channels=8,
        ),
    ),
    "FalconH1ForCausalLM": dict(_MAMBA2, mamba_d_ssm=64),
    "FalconMambaForCausalLM": dict(state_size=8),
    "Florence2ForConditionalGeneration": dict(
        vision_config=dict(
            embed_dim=[32],
            depths=[1],
            patch_size=[7],
            patch_stride=[4],
            patch_padding=[3],
            patch_prenorm=[False],
            num_heads=[4],
            num_groups=[4],
            projection_dim=32,
        )
    ),
    "GPTJForCausalLM": dict(rotary_dim=4),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    "Glm4MoeLiteForCausalLM": dict(_LATENT, **_GROUPS),
    "Glm4vForConditionalGeneration": dict(
        text_config=dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    ),
    "GlmMoeDsaForCausalLM": dict(
        _LATENT,
        **_GROUPS,
        index_topk=4,
        index_head_dim=8,
        index_n_heads=2,
        head_dim=4,
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
    ),
    "GraniteMoeHybridForCausalLM": dict(
        _MAMBA2, layer_types=["mamba", "mamba", "attention", "mamba"], position_embedding_type="rope"
    ),
    "HubertForCTC": _WAVE,
    "HubertModel": _WAVE,
    "JambaForCausalLM": dict(
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "LEDForConditionalGeneration": dict(attention_window=4),
    "Lfm2ForCausalLM": dict(layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "conv", "full_attention", "conv"], num_dense_layers=1),
    "Mamba2ForCausalLM": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=4),
    "MambaForCausalLM": dict(state_size=8),
    "Qwen2_5_VLForConditionalGeneration": dict(
        text_config=dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    ),
    "ViTForImageClassification": _IMAGE,
    "ViTModel": _IMAGE,
    "Wav2Vec2ForCTC": _WAVE,
    "Wav2Vec2ForPreTraining": _WAVE,
    "Wav2Vec2Model": _WAVE,
    "YoutuForCausalLM": _LATENT,
    "Zamba2ForCausalLM": dict(
        layers_block_type=["mamba", "mamba", "hybrid", "mamba"],
        n_mamba_heads=8,
        mamba_d_state=8,
        mamba_ngroups=1,
        chunk_size=4,
        adapter_rank=4,
        num_key_value_heads=4,
    ),
}


def architectures() -> list[str]:
    """The architectures of the installed TransformerLens that have a class in transformers, sorted.

    Each stack of an encoder-decoder is one: ``"T5ForConditionalGeneration encoder"``.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    names = sorted(name for name in SUPPORTED_ARCHITECTURES if hasattr(hf, name))
    return [f"{name} {stack}".rstrip() for name in names for stack in (STACKS if has_two_stacks(name) else ("",))]


def has_two_stacks(name: str) -> bool:
    """Whether an architecture is an encoder-decoder, or has one for its text."""
    config = getattr(hf, name).config_class()
    return any(getattr(each, "is_encoder_decoder", False) for each in (config, getattr(config, "text_config", None)))


def small_config(config_class: Any, special: dict[str, Any]) -> Any:
    """A small configuration of a class, and of the configurations within it."""
    special = dict(special)
    names = inspect.signature(config_class.__init__).parameters
    settings = {name: size for name, size in _BY_NAME.items() if name in names}
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if sub_class is hf.AutoConfig:
            default = getattr(config_class(), name)
            if default is None:
                continue
            sub_class = type(default)
        settings[name] = small_config(sub_class, special.pop(name, {}))
    return config_class(**{**settings, **special})


def huggingface(name: str) -> Any:
    """A small random model of an architecture, its weights large enough to bend activations."""
    model_class = getattr(hf, name)
    config = small_config(model_class.config_class, _SPECIAL.get(name, {}))
    config.architectures = [name]
    torch.manual_seed(0)
    try:
        model = model_class._from_config(config, attn_implementation="eager")
    except ValueError:  # a class that has one attention only
        model = model_class(config)
    for parameter in model.parameters():
        if not parameter.any() or (parameter.ndim > 1 and parameter.std() < 0.1):  # zeros are singular for a norm
            torch.nn.init.normal_(parameter, 0, 0.12)
    return model.float().eval()


def boot(name: str) -> Any:
    """Boot a small random model of an architecture as a bridge."""
    from transformer_lens.model_bridge import TransformerBridge

    return booted(TransformerBridge, name, huggingface(name), _no_tokenizer())


def prompt(model: Any, stack: str = "") -> Any:
    """What a model is run on: token ids, pixels, a spectrogram or a waveform."""
    if stack:  # as many as LED's windows take: it pads others
        return torch.cat([TOKENS, TOKENS[:-6]])
    torch.manual_seed(1)
    if getattr(model.cfg, "is_visual_model", False):
        return {"pixel_values": torch.randn(1, 3, 12, 12)}
    if getattr(model.cfg, "is_audio_model", False):
        spectrogram = hasattr(model.original_model.config, "num_mel_bins")
        return {"input_values": torch.randn(1, 32, 24) if spectrogram else torch.randn(1, 100)}
    return TOKENS


@dataclass(frozen=True)
class Real:
    """A real model, as differences see it.

    Attributes:
        blocks: the blocks of the measured stack.
        run: one forward pass of all of it.
    """

    blocks: Any
    run: Callable[[], Any]

    @classmethod
    def of(cls, model: Any, stack: str = "") -> Real:
        """The real model of a bridge, or one stack of it, on its prompt."""
        given = prompt(model, stack)
        if stack:
            blocks, decoder = getattr(model, f"{stack}_blocks"), DECODER_TOKENS[None]
            return cls(blocks, lambda: model(given[None], decoder_input=decoder, return_type=None))
        inputs = next(iter(given.values())) if isinstance(given, dict) else given[None]
        return cls(model.blocks, lambda: model(inputs, return_type=None))


def difference(real: Real, layer: int, src: int, dest: int, move: Tensor) -> Tensor:
    """The change of what a block adds at dest, per unit of a move of what it reads at src: the real model runs whole.

    Nothing of the library is used: the stream is moved by a hook on the block's module, and read from what it returns.
    """
    given: list[Tensor] = []

    def shift(sign: float, module: Any, args: Any, kwargs: Any) -> Any:
        def moved(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[0, src] += sign * move
            return stream

        if args:
            return (moved(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": moved(kwargs["hidden_states"])}

    def keep(module: Any, args: Any, output: Any) -> None:
        given.append((output[0] if isinstance(output, (tuple, list)) else output)[0, dest].clone())

    block = real.blocks[layer]
    for sign in (1.0, -1.0):
        handles = [
            block.register_forward_pre_hook(partial(shift, sign), with_kwargs=True),
            block.register_forward_hook(keep),
        ]
        try:
            with torch.no_grad():
                real.run()
        finally:
            for handle in handles:
                handle.remove()
    size = float(move.norm())
    return (given[0] - given[1]) / (2 * size) - (move / size if src == dest else 0.0)


def gap(real: Real, trace: tlc.Trace, jacobian: Any, layer: int, src: int, dest: int) -> float:
    """How far a block's Jacobian lies from the differences, as a multiple of what is allowed."""
    stream = trace.resid[layer, src]
    generator = torch.Generator().manual_seed(layer)
    move = torch.randn(trace.d_model, generator=generator) + stream / stream.norm()
    move = move / move.norm()
    product, gaps = jacobian.mv(move.to(jacobian.dtype)), []
    for step in STEPS:
        found = difference(real, layer, src, dest, step * stream.norm() * move)
        allowed = TOLERANCE * torch.maximum(found.norm(), product.norm()) + NOTHING
        gaps.append(float((product - found).norm() / allowed))
    return min(gaps)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the architecture.
        blocks: what its blocks are made of.
        engines: by what is measured, the engine.
        note: why it is refused, or not split.
        gap: the largest distance from the differences, as a multiple of what is allowed.
    """

    name: str
    blocks: str = ""
    engines: tuple[tuple[str, str], ...] = ()
    note: str = ""
    gap: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether its blocks are measured."""
        return bool(self.engines)

    def __str__(self) -> str:
        """One line of the table."""
        engines = dict(self.engines)
        cells = [engines.get(name, "") for name in MEASURED]
        return "| " + " | ".join((f"`{self.name}`", self.blocks, *cells, self.note)) + " |"


def measure(name: str) -> Row:
    """Measure one architecture, or one stack of it."""
    architecture, _, stack = name.partition(" ")
    _stand_in_for_torchvision()
    warnings.simplefilter("ignore")
    try:
        model = boot(architecture)
    except (ImportError, AttributeError, NotImplementedError) as error:
        return Row(name, note=f"TransformerLens does not boot it: {type(error).__name__}")
    options = {"stack": stack, "decoder_input": DECODER_TOKENS} if stack else {}
    try:
        trace = tlc.trace(model, prompt(model, stack), **options)
    except UnsupportedModelError as error:
        return Row(name, note=f"refused: {error.reason}")
    real = Real.of(model, stack)
    pairs = PAIRS if trace.causal else PAIRS + BACKWARDS
    jacobians, worst = JacobianEngine(trace, "auto", pairs), 0.0
    for layer in range(trace.n_layers):
        for sublayer in trace.sublayers:
            for src, dest in pairs:
                jacobian = jacobians.operator(layer, sublayer, src, dest)
                if sublayer == "block":
                    worst = max(worst, gap(real, trace, jacobian, layer, src, dest))
    engines = {part: _engine(used) for part, used in jacobians.used.items()}
    if heads := _heads(trace):
        engines["heads"] = heads
    note = "" if trace.causal else "bidirectional"
    if trace.refusal is not None:
        note = "; ".join(filter(None, (note, "its writes do not add up to the stream")))
    kinds = list(dict.fromkeys(trace.layer_kinds))
    return Row(name, ", ".join(kinds), tuple(engines.items()), note, worst)


def _engine(used: str) -> str:
    both = {"analytic": "closed form", "autograd": "autograd"}
    return both.get(used.partition(" ")[0] if "," not in used else "", "both")


def _heads(trace: tlc.Trace) -> str:
    """Whether attention is split into heads."""
    for layer in range(trace.n_layers):
        for name, sublayer in trace.block(layer).sublayers.items():
            if sublayer.kind == "attn":
                try:
                    tlc.residual_jacobian(trace, layer, name, head=0, engine="autograd")
                except TLCouplingError:
                    return ""
                return "yes"
    return ""


def _stand_in_for_torchvision() -> None:
    """Let multimodal adapters boot: they ask for torchvision, and use it for images alone."""
    if "torchvision" not in sys.modules:
        module = types.ModuleType("torchvision")
        module.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
        sys.modules["torchvision"] = module


def _child(name: str, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    try:
        results.send(measure(name))
    except BaseException as error:  # whatever it is, it becomes a row that no stored table has
        results.send(Row(name, note=f"ERROR {type(error).__name__}: {error}"))


def measure_apart(name: str) -> Row:
    """Measure one architecture in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return Row(name, note="ERROR the process ended: out of memory or time")
    finally:
        process.join()


HEADER = (
    "| architecture | blocks | " + " | ".join(MEASURED) + " | note |",
    "|" + "---|" * (len(MEASURED) + 3),
)


def stored() -> dict[str, str]:
    """The rows of docs/models.md, by architecture."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[len(HEADER) :]
    return {line.split("`")[1]: line for line in lines}


def write(rows: list[Row]) -> None:
    """Put rows into docs/models.md."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    table = "\n".join((*HEADER, *map(str, rows)))
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Measure and print, or write."""
    torch.set_num_threads(1)
    names = [name for name in arguments if not name.startswith("-")] or architectures()
    rows = []
    for name in names:
        rows.append(measure_apart(name))
        engines = ", ".join(f"{name}: {engine}" for name, engine in rows[-1].engines)
        print(rows[-1], f"{rows[-1].gap:.2f} of what is allowed from differences; {engines}", flush=True)
    measured = {row.name.partition(" ")[0] for row in rows if row.measured}
    print(f"{len(measured)} of {len({row.name.partition(' ')[0] for row in rows})} measured at block level")
    if "--write" in arguments:
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
