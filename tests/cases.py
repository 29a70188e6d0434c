"""The shared list of small models: each norm, position scheme, MLP and topology, on the TransformerLens installed.

Weights are random and large enough that attention is uneven and activations are bent. Nothing here needs a model hub.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from families import CONTEXT, D_HEAD, D_MLP, D_MODEL, N_HEADS, N_LAYERS, VOCABULARY, WINDOW, families
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tlcoupling.forward.offline import booted

ALL = ("block", "attn", "mlp")


@dataclass(frozen=True)
class Case:
    """A small model.

    Attributes:
        name: what a failing test shows.
        build: makes the model with weights of a dtype.
        exact: whether the model's own code stays in float64; HuggingFace's eager softmax and RMSNorm, and
            TransformerLens's native RMSNorm, cast to float32 inside even in a float64 model.
        analytic: the sublayers that the analytic engine covers.
        topology: of its blocks.
        splits: whether its attention can be split into heads.
    """

    name: str
    build: Callable[[torch.dtype], Any]
    exact: bool = True
    analytic: tuple[str, ...] = ALL
    topology: str = "sequential"
    splits: bool = True

    @property
    def tolerance(self) -> float:
        """Relative error that two engines may differ by in float64 (the design's numbers)."""
        return 1e-9 if self.exact else 1e-5

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        """The model, made once per dtype."""
        return _built(self.name, dtype)

    def __str__(self) -> str:
        return self.name


@functools.cache
def _built(name: str, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(case for case in CASES if case.name == name).build(dtype).eval()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words w0 .. w47, without a BOS token (TransformerLens would fetch one from the hub)."""
    words = [f"w{index}" for index in range(VOCABULARY - 2)]
    ids = {word: index for index, word in enumerate([*words, "<unk>", "<end>"])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>", name_or_path="tiny"
    )


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of standard deviation 0.25, gains and biases around their usual values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.25 * torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith(("weight", ".w")):
            noise = noise + 1.0
        parameter.data.copy_(noise)
    return model


def huggingface(config: transformers.PretrainedConfig, name: str, architecture: str) -> Callable[[torch.dtype], Any]:
    """What makes a bridge around a small random model of a configuration."""

    def build(dtype: torch.dtype) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        config.architectures = [architecture]
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = randomise(model).to(dtype).eval()
        return booted(TransformerBridge, name, model, tiny_tokenizer())

    return build


_STAYS_IN_FLOAT64 = {"gpt2", "pythia", "pythia-sequential", "falcon", "falcon-two-norms"}
_PARALLEL = {"gptj", "pythia", "phi", "falcon", "falcon-two-norms", "cohere-qk-norm", "stablelm-qk-norm"}
_ON_3 = version("transformer-lens").startswith("3.")
# transformer-lens 3 refuses to boot the first, names the second's norms behind the sublayers as norms before them, and
# leaves gated queries out of the weights of the third
_LEFT_OUT = {"cohere-qk-norm", "olmo2", "qwen3-next"} if _ON_3 else set()
_FAMILIES = [
    Case(
        f"bridge-{name}",
        huggingface(config, hub_name, architecture),
        exact=name in _STAYS_IN_FLOAT64,
        topology="parallel" if name in _PARALLEL else "sequential",
        splits=not name.startswith("deepseek"),
    )
    for name, (hub_name, architecture, config) in families().items()
    if name not in _LEFT_OUT
]

_SIZES: dict[str, Any] = dict(
    n_layers=N_LAYERS,
    d_model=D_MODEL,
    n_ctx=CONTEXT,
    d_head=D_HEAD,
    n_heads=N_HEADS,
    d_mlp=D_MLP,
    d_vocab=VOCABULARY,
    act_fn="gelu",
    seed=0,
    normalization_type="LN",
)
_GATED: dict[str, Any] = dict(
    positional_embedding_type="rotary",
    rotary_dim=D_HEAD,
    normalization_type="RMS",
    gated_mlp=True,
    act_fn="silu",
    n_key_value_heads=2,
)


def _native(**settings: Any) -> Callable[[torch.dtype], Any]:
    def build(dtype: torch.dtype) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        return randomise(TransformerBridge.boot_native({**_SIZES, **settings}, dtype=dtype))

    return build


def _hooked(**settings: Any) -> Callable[[torch.dtype], Any]:
    def build(dtype: torch.dtype) -> Any:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(**{**_SIZES, **settings}, dtype=dtype)
        return randomise(HookedTransformer(config))

    return build


_ROTARY: dict[str, Any] = dict(positional_embedding_type="rotary", rotary_dim=D_HEAD)
_NATIVE = [
    Case("native-layernorm", _native()),
    Case("native-gated", _native(**_GATED), exact=False),
    Case("native-attention-only", _native(attn_only=True), topology="single"),
]
_HOOKED = [
    Case("hooked-layernorm", _hooked()),
    Case("hooked-folded", _hooked(normalization_type="LNPre")),
    Case("hooked-no-norm", _hooked(normalization_type=None)),
    Case("hooked-gated", _hooked(**_GATED)),
    Case("hooked-attention-only", _hooked(attn_only=True), topology="single"),
    Case(
        "hooked-parallel",
        _hooked(parallel_attn_mlp=True, positional_embedding_type="rotary", rotary_dim=D_HEAD // 2),
        topology="parallel",
    ),
    Case("hooked-adjacent-rotary", _hooked(**_ROTARY, rotary_adjacent_pairs=True)),
    Case("hooked-alibi", _hooked(positional_embedding_type="alibi")),
    Case("hooked-soft-cap", _hooked(**_ROTARY, attn_scores_soft_cap=2.0, use_attn_scale=False)),
    Case("hooked-qk-norm", _hooked(**{**_GATED, "use_qk_norm": True})),
    Case(
        "hooked-local",
        _hooked(use_local_attn=True, window_size=WINDOW, attn_types=["global", "local", "local"]),
    ),
    Case("hooked-sandwich", _hooked(**_GATED, use_normalization_before_and_after=True)),
]


def built_here(settings: dict[str, Any]) -> Any:
    """A float64 model of other settings: a ``HookedTransformer``, a native ``TransformerBridge`` where that is gone."""
    build = _hooked if any(case in CASES for case in _HOOKED) else _native
    return build(**settings)(torch.float64).eval()


def fresh(seed: int, **settings: Any) -> Any:
    """A float32 model of width 96 with weights as TransformerLens itself draws them."""
    config = {**_SIZES, "d_model": 96, "d_head": 24, "d_mlp": 384, **settings, "seed": seed}
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        torch.manual_seed(seed)
        return TransformerBridge.boot_native(config).eval()
    return HookedTransformer(HookedTransformerConfig(**config)).eval()


def _available() -> list[Case]:
    cases = []
    try:
        from transformer_lens.model_bridge import TransformerBridge

        cases += _FAMILIES
        # the native attention of transformer-lens 3 has no hook_pattern: only autograd covers it
        if hasattr(TransformerBridge, "boot_native") and not _ON_3:
            cases += _NATIVE
    except ImportError:
        pass
    try:
        from transformer_lens import HookedTransformer  # noqa: F401

        cases += _HOOKED
    except ImportError:
        pass
    return cases


CASES = _available()
_REPRESENTATIVE = {
    "bridge-gpt2",
    "bridge-pythia",
    "bridge-llama",
    "bridge-gemma2",
    "native-attention-only",
    "hooked-layernorm",
    "hooked-parallel",
    "hooked-gated",
    "hooked-attention-only",
}
_OF_BOTH_CLASSES = {"bridge-gpt2", "bridge-gemma2", "hooked-gated", "hooked-parallel", "hooked-attention-only"}
# each topology, gated and rotary and grouped, soft-capped: for tests that are slow or independent of the rest
FEW = [case for case in CASES if case.name in (_OF_BOTH_CLASSES if _ON_3 else _REPRESENTATIVE)]
# the first of each of TransformerLens's classes that is there: for tests of what does not depend on the architecture
OF_EACH_CLASS = [
    next(case for case in FEW if case.name.startswith(kind))
    for kind in ("bridge", "hooked")
    if any(case.name.startswith(kind) for case in FEW)
]
TOKENS = torch.tensor([7, 23, 3, 41, 11, 3, 30])


def part(model: Any, layer: int, path: str) -> torch.nn.Module:
    """HuggingFace's own module behind a bridge."""
    module = model.blocks[layer]
    for name in path.split("."):
        module = getattr(module, name)
    return module.original_component


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """||found - truth|| / ||truth||, 0 where both are zero."""
    gap, size = (found - truth).norm(), truth.norm()
    return float(gap / size) if size > 0 else float(gap)
