"""The description of a block, against what the block does when the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, relative_error
from einops import einsum, rearrange
from torch import nn

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.block import Block, Sublayer, Uncovered, weight_of
from tlcoupling.forward.hooked import attached
from tlcoupling.forward.split import ATTENTION, SEQUENTIAL, block_hook, splits_of_model

ATTN, MLP = SEQUENTIAL.parts

LAYER = 1
FACTORS = {"bridge-granite": 0.5}  # its residual_multiplier
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Seen:
    """What the modules of a block read and give, and its activations by short hook name, in one forward pass."""

    def __init__(self, model: Any, block: Block, edit: str | None = None) -> None:
        """Run the model; ``edit`` names a hook point of the block to which noise is added."""
        self.read: dict[nn.Module, torch.Tensor] = {}
        self.gave: dict[nn.Module, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                # OPT's second norm reads rows without a batch axis
                self.read[module], self.gave[module] = (x.detach().flatten(0, -2) for x in (args[0], output))

        def keep(name: str) -> Any:
            def record(tensor: torch.Tensor) -> torch.Tensor | None:
                if name == edit:
                    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype)
                    return tensor + noise
                self.values[name] = tensor.detach()[0].clone()
                return None

            return record

        prefix = block_hook(block.layer, "")
        points = {name.removeprefix(prefix): p for name, p in model.hook_dict.items() if name.startswith(prefix)}
        norms = {norm for s in block.sublayers.values() for norm in (s.before, s.behind) if norm is not None}
        handles = [norm.register_forward_hook(watch) for norm in norms]
        try:
            with torch.no_grad(), attached([(point, keep(name)) for name, point in points.items()]):
                model(TOKENS[None])
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture
def block(case: Case) -> Block:
    return Block.read(case.model(), LAYER)


@pytest.fixture
def seen(case: Case, block: Block) -> Seen:
    return Seen(case.model(), block)


@each_case
def test_norms_stand_where_the_description_says(case: Case, block: Block, seen: Seen):
    """Those before read the sublayer's stream, those behind give its write, and no other norm is in the block."""
    for sublayer in block.sublayers.values():
        if sublayer.before is not None:
            stream = seen.values.get(sublayer.reads, seen.values["hook_resid_pre"])
            assert relative_error(seen.read[sublayer.before], stream) < 1e-12
        if sublayer.behind is not None:
            assert relative_error(seen.gave[sublayer.behind], seen.values[sublayer.write]) < 1e-12
    described = {id(norm) for s in block.sublayers.values() for norm in (s.before, s.behind) if norm is not None}
    children = [child for name, child in block.module.named_children() if name.startswith("ln")]
    assert described == {id(child) for child in children if not isinstance(child, nn.Identity)}


@each_case
def test_the_topology_of_each_block_is_how_its_sublayers_are_arranged(case: Case, block: Block, seen: Seen):
    """An MLP sees a change of what the attention writes where the block is sequential, and nowhere else."""
    model = case.model()
    assert {split.topology for split in splits_of_model(model)} == {case.topology}
    assert block.topology == case.topology
    assert tuple(block.sublayers) == (("attn",) if case.topology == "single" else ("attn", "mlp"))
    if case.topology != "single":
        edited = Seen(model, block, edit=block.attn.write).values[block.mlp.write]
        moved = relative_error(edited, seen.values[block.mlp.write]) > 1e-3
        assert moved == (case.topology == "sequential") == (block.mlp.reads == "hook_resid_mid")


@each_case
def test_weights_are_what_the_module_multiplies_by(case: Case, block: Block, seen: Seen):
    """Each projection's output is the product of its input with the weight, and a bias."""
    for name, sublayer in block.sublayers.items():
        if name not in case.analytic or sublayer.has_experts or case.name.startswith("bridge-deepseek"):
            continue  # experts and latents are read by the engine itself
        weights = sublayer.weights()
        stream = seen.values.get(sublayer.reads, seen.values["hook_resid_pre"])
        read = stream if sublayer.before is None else seen.gave[sublayer.before]
        if name == "attn":
            for letter in ("q", "k", "v"):
                values = seen.values[f"attn.hook_{letter}"]
                weight = weights[f"W_{letter.upper()}"]
                if letter == "q" and values.shape[1] > len(weight):
                    values = values[:, ::2]  # gates stand behind the queries
                weight = weight[:: len(weight) // values.shape[1]]
                product = einsum(read, weight.to(read), "pos d, head d e -> pos head e")
                assert _differ_by_a_bias(product.flatten(1), values.flatten(1), case.tolerance), letter
            write = rearrange(weights["W_O"], "head e d -> (head e) d")
            inner = seen.values["attn.hook_z"].flatten(1)
        else:
            into = weights["W_gate"] if "W_gate" in weights else weights["W_in"]
            pre = seen.values["mlp.hook_pre"].flatten(0, -2)[:, : into.shape[1]]  # ModernBERT's holds both
            assert _differ_by_a_bias(read @ into.to(read), pre, case.tolerance)
            write, inner = weights["W_out"], seen.values["mlp.hook_post"].flatten(0, -2)
        if sublayer.behind is None:
            written = seen.values[sublayer.write]
            factor = sublayer.write_factor(seen.values.get(sublayer.gives), written)
            assert factor == pytest.approx(FACTORS.get(case.name, 1.0), rel=1e-6)
            assert _differ_by_a_bias(factor * (inner @ write.to(inner)), written, case.tolerance)
        else:
            unnormed = seen.read[sublayer.behind]
            assert _differ_by_a_bias(inner @ write.to(inner), unnormed, case.tolerance)
            assert sublayer.write_factor(2 * unnormed, unnormed) == 1.0


def _differ_by_a_bias(product: torch.Tensor, values: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by one vector at all positions."""
    return relative_error(product - product.mean(0), (values - values.mean(0)).to(product)) < 10 * tolerance


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in CASES
        for of, name in (("bridge-mixtral", "mlp"), ("bridge-deepseek-v3", "attn"))
        if case.name == of
    ],
    ids=str,
)
def test_a_sublayer_of_other_weights_says_which_one_it_lacks(case: Case, name: str, block: Block):
    with pytest.raises(Uncovered, match=r"has no W_|axes"):
        block.sublayers[name].weights()


@each_case
def test_what_the_norm_behind_reads_is_kept_while_the_block_runs(case: Case, block: Block):
    for sublayer in block.sublayers.values():
        kept: list[torch.Tensor] = []
        with sublayer.keep_unnormed(kept.append):
            seen = Seen(case.model(), block)
        assert len(kept) == (sublayer.behind is not None)
        if sublayer.behind is not None:
            assert torch.equal(kept[0].flatten(0, -2), seen.read[sublayer.behind])
            assert not sublayer.behind._forward_pre_hooks


def test_a_factor_is_found_where_there_is_one_and_only_there():
    given = torch.randn(5, 8, dtype=torch.float64)
    plain = Sublayer(ATTN, nn.Identity(), None, None)
    normed = Sublayer(ATTN, nn.Identity(), None, nn.LayerNorm(8))
    assert plain.write_factor(given, 0.22 * given) == pytest.approx(0.22, rel=1e-12)
    assert normed.write_factor(given, 0.22 * given) == 1.0
    assert plain.write_factor(None, given) == 1.0
    assert plain.write_factor(given, given + torch.randn(8)) == 1.0
    rescaled_by_row = given * torch.linspace(0.2, 0.3, 5, dtype=torch.float64)[:, None]
    assert plain.write_factor(given, rescaled_by_row) == 1.0


def test_a_weight_that_a_module_refuses_is_none():
    """DeepSeek's attention answers with NotImplementedError, which getattr with a default lets through."""

    class Compressed(nn.Module):
        def __getattr__(self, name: str) -> Any:
            if name == "W_Q":
                raise NotImplementedError(name)
            return super().__getattr__(name)

    module = Compressed()
    module.W_K = nn.Parameter(torch.ones(2))
    assert weight_of(module, "W_Q") is None
    assert weight_of(module, "W_V") is None
    assert weight_of(module, "W_K") is module.W_K
    assert weight_of(nn.Linear(2, 2), "training") is None  # not a tensor
    attn = Sublayer(ATTN, module, None, None)
    with pytest.raises(UnsupportedModelError, match=r"layer 3 \(Compressed\) has no W_O to split it"):
        Block(None, 3, ATTENTION, {"attn": attn}).output_of_heads(torch.ones(1, 5, 2, 4))


def test_experts_have_weights_with_another_number_of_axes():
    module = nn.Module()
    module.W_in, module.W_out = torch.ones(4, 6, 8), torch.ones(4, 8, 6)
    with pytest.raises(Uncovered, match="W_in of Module has 3 axes, not 2"):
        Sublayer(MLP, module, None, None).weights()


def test_a_part_under_another_name_has_no_closed_form():
    """The block is described all the same: autograd needs only its hook points."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.feed_forward = nn.Identity(), nn.Identity()

    model = nn.Module()
    model.blocks = nn.ModuleList([Named()])
    block = Block.read(model, 0, SEQUENTIAL)
    with pytest.raises(Uncovered):
        block.mlp.weights()
