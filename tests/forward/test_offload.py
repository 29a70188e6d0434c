"""Models whose weights accelerate keeps elsewhere: the same numbers, and one layer in memory at a time."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from cases import CASES, TOKENS, Case
from devices import DEVICES, MEASUREMENTS, require_same, simulated_devices
from families import families
from torch.multiprocessing.reductions import StorageWeakRef

import tlcoupling as tlc
from tlcoupling.errors import StaleTraceError, UnsupportedModelError
from tlcoupling.forward import lifting
from tlcoupling.forward.offload import device_of, hooks_of, is_offloaded

accelerate = pytest.importorskip("accelerate")

# rotary and gated; norms behind the sublayers; experts; parallel; TransformerLens's own modules
_NAMES = {"bridge-llama", "bridge-gemma2", "bridge-mixtral", "bridge-gptj", "native-gated", "hooked-gated"}
OFFLOADED = [case for case in CASES if case.name in _NAMES]
FIRST = pytest.mark.parametrize("case", OFFLOADED[:1], ids=str)
BRIDGE = pytest.mark.skipif(
    not any(case.name.startswith("bridge") for case in CASES), reason="TransformerBridge came with transformer-lens 3.0"
)
# In releases before, its bridges refuse a disk in a device map; disk_offload writes none.
MAPS = pytest.mark.skipif(version("transformer-lens")[:1] < "4", reason="TransformerLens 4 wraps such models")
CPU = torch.device("cpu")


def inner(model: Any) -> Any:
    """The modules to which accelerate attaches its hooks."""
    return getattr(model, "original_model", None) or model


def on_disk(model: Any, folder: Path) -> Any:
    accelerate.disk_offload(inner(model), str(folder), execution_device=CPU)
    return model


def both(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[tlc.Trace, tlc.Trace]:
    """Traces of a model in memory and of the same on disk."""
    one, two = case.build(dtype).eval(), case.build(dtype).eval()
    inner(two).load_state_dict(inner(one).state_dict())
    return tlc.trace(one, TOKENS), tlc.trace(on_disk(two, folder), TOKENS)


def llama() -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(families()["llama"][2], dtype=torch.float32).eval()


def require_offloaded(model: Any) -> None:
    """The model is as accelerate left it: no weight of its blocks in memory, its hooks at work."""
    parts = [part for block in model.blocks for part in block.modules()]
    assert all(weight.is_meta for part in parts for weight in part._parameters.values() if weight is not None)
    assert all(any(hook.offload for hook in hooks_of(part)) for part in parts if part._parameters and hooks_of(part))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in OFFLOADED), *((case, torch.bfloat16) for case in OFFLOADED[1:3])],
    ids=str,
)
def test_numbers_are_those_of_the_model_in_memory(case: Case, dtype: torch.dtype, tmp_path: Path):
    """The same operations on the same numbers in the same order."""
    one, two = both(case, tmp_path, dtype)
    assert torch.equal(one.resid, two.resid)
    for name in ("depth", "depth, autograd", "heads", "growth")[: None if case.splits else 2]:
        found, expected = MEASUREMENTS[name](two), MEASUREMENTS[name](one)
        require_same(found, expected)
        assert found.provenance.engine == expected.provenance.engine
    require_offloaded(two.model)


@FIRST
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_takes_an_offloaded_model(case: Case, name: str, tmp_path: Path):
    one, two = both(case, tmp_path)
    require_same(MEASUREMENTS[name](two), MEASUREMENTS[name](one))


@FIRST
def test_a_stored_lens_is_that_of_the_model_in_memory(case: Case, tmp_path: Path):
    """The key is made of the weights' numbers, wherever these lie."""
    lenses = [
        tlc.lens_sweep(each.model, [TOKENS], tmp_path / "store", skip_first_positions=0)
        for each in both(case, tmp_path)
    ]
    assert torch.equal(lenses[0].matrices, lenses[1].matrices)
    assert len(tlc.SweepStore(tmp_path / "store").lens_keys()) == 1


HELD: dict[str, tuple[Callable[[tlc.Trace], Any], int]] = {
    "depth": (MEASUREMENTS["depth"], 1),
    "depth, autograd": (MEASUREMENTS["depth, autograd"], 1),
    "depth, krylov": (MEASUREMENTS["depth, krylov"], 1),
    "tokens, other layers' bases": (MEASUREMENTS["tokens, other layers' bases"], 1),
    "heads": (MEASUREMENTS["heads"], 1),
    "slice": (lambda trace: tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", 2)).dense(), 1),
    # a Jacobian of the layer before is dropped behind the next one
    "linearized": (lambda trace: tlc.linearized(trace, torch.ones(trace.d_model), tokens="all"), 2),
}


@FIRST
@pytest.mark.parametrize("name", HELD)
def test_the_weights_of_one_layer_are_in_memory_at_a_time(
    case: Case, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each reading of a weight, those that were read for other layers are gone; accelerate reads none besides."""
    measure, allowed = HELD[name]
    read, held = lifting.read, []
    counts: list[int] = []
    fetch, fetched = accelerate.utils.OffloadedWeightsLoader.__getitem__, []

    def recorded(self: Any, key: str) -> torch.Tensor:
        fetched.extend(part for part in key.split(".")[:-1] if part.isdigit())
        return fetch(self, key)

    def watched(hook: Any, name: str, like: torch.Tensor) -> torch.Tensor:
        made = read(hook, name, like)
        gc.collect(0)
        layers = [part for part in hook.weights_map.prefix.split(".") if part.isdigit()]
        held[:] = [(layer, storage) for layer, storage in held if not storage.expired()]
        held.extend((layer, StorageWeakRef(made.untyped_storage())) for layer in layers[:1])
        counts.extend([len({layer for layer, _ in held})] * len(layers[:1]))
        return made

    monkeypatch.setattr(lifting, "read", watched)
    monkeypatch.setattr(accelerate.utils.OffloadedWeightsLoader, "__getitem__", recorded)
    one, two = both(case, tmp_path)
    fetched.clear()  # by accelerate, as it attached its hooks
    counts.clear()
    found, expected = measure(two), measure(one)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, products of another order
    assert 1 <= max(counts) <= allowed
    assert len(fetched) == len(counts)


@BRIDGE
@pytest.mark.parametrize("kept", ["host", *(pytest.param(kept, marks=MAPS) for kept in ("map", "checkpoint"))])
def test_however_accelerate_offloads(kept: str, tmp_path: Path):
    """A bare HuggingFace model: on the host; by a device map, some in memory and some on disk; loaded so."""
    whole, offloaded = llama(), llama()
    count = offloaded.config.num_hidden_layers
    parts = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    parts |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(count)}
    if kept == "host":
        accelerate.cpu_offload(offloaded, CPU)
    elif kept == "map":
        offloaded = accelerate.dispatch_model(offloaded, parts, offload_dir=str(tmp_path / "weights"))
    else:
        offloaded.save_pretrained(tmp_path / "model")
        offloaded = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=parts, offload_folder=str(tmp_path / "weights"), dtype=torch.float32
        ).eval()
    before = [weight.is_meta for weight in offloaded.parameters()]
    assert any(before) and (kept == "host" or not all(before))
    one, two = tlc.trace(whole, TOKENS), tlc.trace(offloaded, TOKENS)
    require_same(tlc.depth_coupling(two, 3), tlc.depth_coupling(one, 3))
    assert [weight.is_meta for weight in offloaded.parameters()] == before


@MAPS
def test_a_device_map_of_two_devices_and_a_disk(tmp_path: Path):
    """accelerate's own map, on simulated devices that refuse to meet: each layer where its weights are brought to."""
    with simulated_devices():
        model = llama()
        first, second = map(str, DEVICES)
        parts = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
        parts |= {"model.layers.1": "disk", "model.layers.2": second, "model.norm": second, "lm_head": second}
        two = tlc.trace(
            accelerate.dispatch_model(model, parts, main_device=first, offload_dir=str(tmp_path), force_hooks=True),
            TOKENS,
        )
        one = tlc.trace(llama(), TOKENS)
        assert [device_of(block) for block in two.model.blocks] == [DEVICES[0], DEVICES[0], DEVICES[1]]
        assert [is_offloaded(block) for block in two.model.blocks] == [False, True, False]
        for name in ("depth", "depth, autograd", "tokens", "growth"):
            require_same(MEASUREMENTS[name](two), MEASUREMENTS[name](one))


@FIRST
def test_a_held_jacobian_keeps_the_numbers_that_it_was_made_with(case: Case, tmp_path: Path):
    one, two = both(case, tmp_path)
    ours, truth = (tlc.residual_jacobian(trace, 1, "mlp") for trace in (two, one))
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(ours.dense(), truth.dense(), rtol=0, atol=0)
    with pytest.raises(UnsupportedModelError, match="cannot be read from where it was put .*FileNotFoundError"):
        tlc.residual_jacobian(two, 1)


@FIRST
def test_other_weights_on_the_disk_are_noticed(case: Case, tmp_path: Path):
    _, two = both(case, tmp_path)
    for path in tmp_path.glob("*.1.*mlp*.dat"):  # a weight has several names in a bridge
        weight = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
        path.write_bytes(weight.roll(1).numpy().tobytes())
    with pytest.raises(StaleTraceError, match="gives another output now than when the trace was taken"):
        tlc.residual_jacobian(two, 1)


@FIRST
def test_hooks_of_the_users_act(case: Case, tmp_path: Path):
    def halved(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation / 2

    hooks = [("blocks.1.hook_mlp_out", halved)]
    one, two = (tlc.trace(trace.model, TOKENS, fwd_hooks=hooks) for trace in both(case, tmp_path))
    with pytest.warns(UserWarning, match="only autograd sees them act"):
        found, expected = MEASUREMENTS["depth"](two), MEASUREMENTS["depth"](one)
    require_same(found, expected)


@FIRST
def test_an_estimate_knows_the_device_and_what_is_brought_into_memory(case: Case, tmp_path: Path):
    one, two = both(case, tmp_path)
    ours, truth = (tlc.estimate(trace.model, TOKENS, 3) for trace in (two, one))
    assert (ours.rates, ours.flops) == (truth.rates, truth.flops)  # of the CPU, and not of the device "meta"
    block = sum(weight.nbytes for weight in two.model.blocks[0].parameters())
    # what is read, and pages of files or holes beside it
    assert 2 * block <= ours.memory_bytes - truth.memory_bytes <= 3 * block


@FIRST
def test_what_needs_all_weights_is_refused(case: Case, tmp_path: Path):
    _, two = both(case, tmp_path)
    with pytest.raises(UnsupportedModelError, match="no gradient of the loss would reach them"):
        tlc.coupling_loss(two.model, TOKENS, 2)
    with pytest.raises(UnsupportedModelError, match="those of a random baseline would all be in memory"):
        tlc.random_baseline(two.model)


@FIRST
def test_weights_that_nothing_brings_are_refused(case: Case):
    model = case.build(torch.float32).eval().to("meta")
    for call in (lambda: tlc.trace(model, TOKENS), lambda: tlc.estimate(model, TOKENS, 2)):
        with pytest.raises(UnsupportedModelError, match=r"weights not in memory: .* no hook of accelerate"):
            call()


@BRIDGE
def test_weights_that_another_modules_hook_brings_are_refused(tmp_path: Path):
    model = llama()
    accelerate.disk_offload(model, str(tmp_path), execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(UnsupportedModelError, match=r"weights not in memory: .*preload_module_classes"):
        tlc.trace(model, TOKENS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit and the peak are Linux's")
def test_a_model_larger_than_the_memory_that_it_is_given():
    """The program that the documentation names, on a smaller model: 194 MiB of weights in 92 MiB."""
    path = Path(__file__).parents[2] / "benchmarks" / "offloaded.py"
    spec = importlib.util.spec_from_file_location("offloaded", path)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    limit = 92 * program.MIB
    total, found = program.compare(512, 12, limit)
    assert total > 2 * limit
    assert found["on disk"]["peak"] < limit * 1.1 < total < found["in memory"]["peak"]  # pages of files count too
    assert (
        found["on disk"]["engine"]
        == found["in memory"]["engine"]
        == dict.fromkeys(("block", "attn", "mlp"), "analytic")
    )
    assert found["on disk"]["resid"] == found["in memory"]["resid"]
    here, there = (torch.tensor(one["coupling"]) for one in found.values())
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)  # another schedule: triplets of another order
