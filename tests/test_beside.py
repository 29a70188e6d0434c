"""Other packages where they meet this one: the same numbers, whichever of the two has them.

Each test is skipped where its package is absent. ``scripts/beside.py --run`` installs the packages and runs the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from cases import CASES, TOKENS, randomise, relative_error, tiny_tokenizer
from families import families

import tlcoupling as tlc
from tlcoupling.errors import HookError
from tlcoupling.models.load import _transformer_bridge

needs_bridge = pytest.mark.skipif(_transformer_bridge() is None, reason="a HuggingFace model is seen through a bridge")
needs_transformers_5 = pytest.mark.skipif(hf.__version__ < "5", reason="blocks give tuples before transformers 5")


def gpt2() -> Any:
    config = families()["gpt2"][2]
    return randomise(hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def same_trajectories(cache: dict[str, torch.Tensor], trace: tlc.Trace) -> None:
    """Linearity and growth of a cache are those of a trace: the same float32 numbers, added up in the same order."""
    for measure, names in ((tlc.linearity, ("lss", "straightness")), (tlc.growth, ("norms", "alpha", "expodistance"))):
        ours, theirs = measure(trace), measure(cache)
        for name in names:
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert tlc.linearity(cache).paths == tlc.linearity(trace).paths == ("block", "sublayer", "attn", "mlp")


@needs_bridge
@needs_transformers_5
def test_what_nnsight_saves_goes_into_linearity_and_growth():
    nnsight = pytest.importorskip("nnsight")
    model, cache = gpt2(), {}
    trace = tlc.trace(model, TOKENS)  # before the other package adds modules of its own
    traced = nnsight.NNsight(model)
    with traced.trace(TOKENS[None]):
        for layer in range(model.config.n_layer):
            block = traced.transformer.h[layer]
            cache[f"blocks.{layer}.hook_resid_pre"] = block.input.save()
            cache[f"blocks.{layer}.hook_attn_out"] = block.attn.output[0].save()
            cache[f"blocks.{layer}.hook_resid_mid"] = block.ln_2.input.save()
            cache[f"blocks.{layer}.hook_mlp_out"] = block.mlp.output.save()
            cache[f"blocks.{layer}.hook_resid_post"] = block.output.save()
    same_trajectories(cache, trace)


@needs_bridge
@needs_transformers_5
def test_what_nnterp_saves_goes_into_linearity_and_growth():
    """By the names that it gives to the parts of every architecture."""
    nnterp = pytest.importorskip("nnterp")
    model, cache = gpt2(), {}
    trace = tlc.trace(model, TOKENS)  # before the other package adds modules of its own
    traced = nnterp.StandardizedTransformer(model, tokenizer=tiny_tokenizer(), check_renaming=False)
    with traced.trace(TOKENS[None]):
        for layer in range(model.config.n_layer):
            cache[f"blocks.{layer}.hook_resid_pre"] = traced.layers_input[layer].save()
            cache[f"blocks.{layer}.hook_attn_out"] = traced.attentions_output[layer].save()
            cache[f"blocks.{layer}.hook_mlp_out"] = traced.mlps_output[layer].save()
            cache[f"blocks.{layer}.hook_resid_post"] = traced.layers_output[layer].save()
    for layer in range(model.config.n_layer):
        mid = cache[f"blocks.{layer}.hook_resid_pre"] + cache[f"blocks.{layer}.hook_attn_out"]
        cache[f"blocks.{layer}.hook_resid_mid"] = mid
    same_trajectories(cache, trace)


@needs_bridge
def test_tuned_lens_reads_the_stream_of_a_trace():
    """Its translators are zero before they are trained, and x^L needs none: both lenses give the model's own logits."""
    lenses = pytest.importorskip("tuned_lens.nn.lenses")
    model = gpt2()
    trace = tlc.trace(model, TOKENS)
    logits = model(TOKENS[None]).logits[0]
    for lens in (lenses.LogitLens.from_model(model), lenses.TunedLens.from_model(model)):
        last = lens(trace.resid[-1], trace.n_layers - 1)
        torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-4)  # float32
        assert relative_error(lens(trace.resid[0], 0), logits) > 0.1


def test_a_replacement_model_of_circuit_tracer_is_measured_as_its_model_or_refused():
    """Its forward pass is the model's. Its hooks stop gradients: a derivative through them is not a Jacobian."""
    replacement = pytest.importorskip("circuit_tracer.replacement_model.replacement_model_transformerlens")
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 32, "n_ctx": 32, "d_head": 8, "d_mlp": 48, "d_vocab": 50}
    config = HookedTransformerConfig(**sizes, act_fn="gelu", seed=0, dtype=torch.float64, device="cpu")
    plain = randomise(HookedTransformer(config)).eval()
    transcoders = {
        layer: SingleLayerTranscoder(32, 64, torch.relu, layer, device=torch.device("cpu"), dtype=torch.float64)
        for layer in range(3)
    }
    model = replacement.TransformerLensReplacementModel.from_config(
        config, TranscoderSet(transcoders, "ln2.hook_normalized", "hook_mlp_out")
    ).eval()
    renamed = {"mlp.": "mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
    for name, tensor in plain.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        model.state_dict()[name].copy_(tensor)
    ours, theirs = tlc.trace(model, TOKENS), tlc.trace(plain, TOKENS)
    torch.testing.assert_close(ours.resid, theirs.resid, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tlc.linearity(ours).lss, tlc.linearity(theirs).lss, rtol=1e-10, atol=0)
    torch.testing.assert_close(tlc.growth(ours).alpha, tlc.growth(theirs).alpha, rtol=1e-9, atol=1e-12)
    for sublayer in ("block", "attn", "mlp"):
        with pytest.raises(HookError):
            tlc.residual_jacobian(ours, 1, sublayer)


def watched_run(folder: Path, report_to: str, logger: Any) -> tlc.TrainingMonitor:
    """A Trainer's run whose own logs go to the same places, two of them a step (its loss and an evaluation's)."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = families()["llama"][2]
    model = hf.AutoModelForCausalLM.from_config(config)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, config.vocab_size, (8, 8)).tolist()]
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[report_to],
    )
    prompts = {"one": [1, 5, 9, 2, 7, 30], "two": [3, 3, 4, 5, 6]}
    monitor = tlc.TrainingMonitor(model, prompts, every=2, k=4, verbose=False, loggers=[logger])
    callbacks = [monitor.as_trainer_callback()]
    hf.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks).train()
    return monitor


def require_logged(logged: dict[int, dict[str, float]], monitor: tlc.TrainingMonitor) -> None:
    """What was read back is the mean over prompts of the monitor's table."""
    table = monitor.table().query("sublayer == 'block'").groupby("step")[["coupling", "null", "excess", "lss"]].mean()
    assert list(logged) == table.index.tolist() == [0, 2, 4]
    names = {"coupling/block/k4": "coupling", "null/block/k4": "null", "excess/block/k4": "excess", "lss/block": "lss"}
    for step, row in table.iterrows():
        for name, column in names.items():
            assert logged[step][f"tlcoupling/{name}"] == pytest.approx(row[column], rel=1e-6)  # events are float32


@needs_bridge
def test_a_trainers_run_is_read_back_from_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "trainer"))
    with SummaryWriter(str(tmp_path / "monitor")) as writer:
        monitor = watched_run(tmp_path, "tensorboard", writer)
    events = EventAccumulator(str(tmp_path / "monitor")).Reload()
    logged: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            logged.setdefault(event.step, {})[name] = event.value
    require_logged(logged, monitor)


@needs_bridge
def test_a_trainers_run_is_read_back_from_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the Trainer's own run, whose counter of steps is ahead of the training's: each of its logs adds one."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="test") as run:
        monitor = watched_run(tmp_path, "wandb", run)
    wandb.teardown()  # the process that writes the file ends, and has written all of it
    (path,) = tmp_path.rglob("*.wandb")
    rows = [row for row in rows_of_wandb(path) if "tlcoupling/coupling/block/k4" in row]
    require_logged({row["tlcoupling/step"]: row for row in rows}, monitor)
    assert rows[-1]["_step"] > rows[-1]["tlcoupling/step"]


def rows_of_wandb(path: Path) -> list[dict[str, float]]:
    """The rows of an offline run's history, from its file: a header of 7 bytes, then records in LevelDB's log format.

    Each block of 32 KiB holds chunks (4 bytes of checksum, 2 of length, 1 of kind: 1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    content, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if at % 2**15 > 2**15 - 7:  # the padding of a block
            at += -at % 2**15
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if items := record.history.item:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_jacobian_of_low_rank_is_a_factored_matrix():
    """The attention core of a head has no more rank than the head's width, so its top triplets are all of it."""
    from transformer_lens import FactoredMatrix

    model = next(case for case in CASES if case.name == "bridge-llama" or case.name == "hooked-gated").model()
    trace = tlc.trace(model, TOKENS)
    jacobian = tlc.residual_jacobian(trace, 1, "attn", src=2, dest=4, head=1, engine="analytic")
    rank = int(torch.linalg.matrix_rank(jacobian.dense()))
    assert 0 < rank < trace.d_model
    top = tlc.truncated_svd(jacobian, rank)
    factored = FactoredMatrix(top.u * top.s, top.v.mT)
    torch.testing.assert_close(factored.AB, jacobian.dense(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factored.S, top.s, rtol=1e-9, atol=1e-9)
    assert factored.norm().item() == pytest.approx(jacobian.dense().norm().item(), rel=1e-9)
    x = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(factored @ x, jacobian.mv(x), rtol=1e-9, atol=1e-9)
    # composed with another head's, without a matrix of the model's width
    both = FactoredMatrix(top.u * top.s, top.v.mT) @ factored
    torch.testing.assert_close(both.AB, jacobian.dense() @ jacobian.dense(), rtol=1e-9, atol=1e-9)


def test_a_result_is_drawn_by_plotly_from_pandas_and_from_xarray():
    pytest.importorskip("xarray")
    express = pytest.importorskip("plotly.express")
    coupling = tlc.depth_coupling(tlc.trace(CASES[0].model(), TOKENS), 3, sublayers="block")
    excess = coupling.excess[0, 0, 0]
    array = coupling.to_xarray()["excess"].squeeze(drop=True)
    image = express.imshow(array).data[0]
    assert torch.equal(torch.as_tensor(image.z), excess)
    assert list(image.x) == list(image.y) == list(coupling.layers)
    table = coupling.to_dataframe().query("quantity == 'excess'")
    lines = express.line(table, x="basis_layer", y="value", color="layer").data
    for row, line in zip(excess, lines, strict=True):
        assert torch.equal(torch.as_tensor(line.y), row)
