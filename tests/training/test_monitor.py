"""TrainingMonitor: the training run does not notice it, and what it records is what the library measures."""

from __future__ import annotations

import gc
import importlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import tiny_tokenizer

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, StoreError, UnsupportedModelError
from tlcoupling.models.load import _hooked_transformer, _transformer_bridge
from tlcoupling.sweeps.cells import Cell
from tlcoupling.training.in_training import evaluated


# The type checker of the test suite picks the items that it looks at by Python's random generator.
@pytest.fixture
def untyped(unchecked: None) -> None:
    """No type is checked at run time, as in a user's hands."""


PROMPTS = {"one": [1, 5, 9, 2, 7, 30], "two": [3, 3, 4, 5, 6]}
VOCABULARY = 48
needs_bridge = pytest.mark.skipif(_transformer_bridge() is None, reason="a HuggingFace model is seen through a bridge")


def llama(layers: int = 3) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.2, bos_token_id=0, eos_token_id=0, **sizes)
    )


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    )


def neox() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            hidden_dropout=0.2,
            attention_dropout=0.2,
            bos_token_id=0,
            eos_token_id=0,
            **sizes,
        )
    )


def bridge() -> Any:
    return _transformer_bridge().boot_transformers("gpt2", hf_model=gpt2(), tokenizer=tiny_tokenizer())


def hooked() -> Any:
    """A HookedTransformer, which has no dropout of its own: some is hooked on."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=64, d_vocab=VOCABULARY, act_fn="gelu", seed=0
    )
    model = HookedTransformer(config)
    model.embed.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.2, training=module.training)
    )
    return model


HUGGINGFACE = [pytest.param(make, id=make.__name__, marks=needs_bridge) for make in (llama, gpt2, neox)]
OWN = [pytest.param(bridge, marks=needs_bridge, id="bridge")]
if _hooked_transformer() is not None:
    OWN.append(pytest.param(hooked, id="hooked"))
ALL = [*HUGGINGFACE, *OWN]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "hook_dict"):
        return model(ids, return_type="loss")
    return model(ids, labels=ids).loss


def train(
    make: Callable[[], Any], steps: int = 9, watch: Callable[[Any], Any] | None = None
) -> tuple[list[float], Any]:
    """Losses of a run with accumulated gradients, clipping and noise from every generator there is."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    model = make().train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    monitor, losses = watch(model) if watch else None, []
    for step in range(steps):
        shift = int(np.random.randint(3)) + random.randrange(3)
        ids = (torch.randint(0, VOCABULARY - 8, (2, 10)) + shift) % VOCABULARY
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        if monitor is not None:
            monitor(step)  # with gradients in place
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return losses, monitor


def monitored(every: int = 2, **options: Any) -> Callable[[Any], tlc.TrainingMonitor]:
    return lambda model: tlc.TrainingMonitor(model, PROMPTS, every=every, k=4, verbose=False, **options)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("make", ALL)
def test_the_loss_is_bit_identical_with_and_without_the_monitor(make: Callable[[], Any]):
    alone, _ = train(make)
    watched, monitor = train(make, watch=monitored())
    assert watched == alone  # to the last bit
    assert monitor.calls == 5 and monitor.seconds > 0
    repeated, _ = train(make)
    assert repeated == alone  # the run depends on nothing but its seed, so that the equality above says something
    assert monitor.table()["step"].drop_duplicates().tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("make", ALL)
def test_dropout_is_at_work_in_these_runs(make: Callable[[], Any]):
    model, ids = make().train(), torch.arange(10)[None]
    assert loss_of(model, ids) != loss_of(model, ids)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("make", ALL)
def test_modes_gradients_generators_and_weights_are_left_as_they_were(make: Callable[[], Any]):
    model = make().train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.training = False
    loss_of(model, torch.arange(10)[None]).backward()
    before = [
        (parameter.clone(), None if parameter.grad is None else parameter.grad.clone())
        for parameter in model.parameters()
    ]
    held = [(id(parameter), id(parameter.grad), parameter.requires_grad) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    keys = list(model.state_dict())
    tlc.TrainingMonitor(model, PROMPTS, k=4, verbose=False)(0)
    assert [module.training for module in model.modules()] == modes and not frozen.training
    assert list(model.state_dict()) == keys
    assert [(id(one), id(one.grad), one.requires_grad) for one in model.parameters()] == held
    for parameter, (weight, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)
        assert (parameter.grad is None) == (gradient is None) and (
            gradient is None or torch.equal(parameter.grad, gradient)
        )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("make", [*HUGGINGFACE[::2], *OWN])  # llama; neox, whose bridge copies weights
def test_what_is_recorded_of_a_step_is_what_analyze_measures_of_those_weights(make: Callable[[], Any]):
    def watch(model: Any) -> Callable[[int], None]:
        monitor = monitored(every=8)(model)

        def call(step: int) -> None:
            if (means := monitor(step)) is not None:
                found.append((means, {name: weight.clone() for name, weight in model.state_dict().items()}))

        return call

    found: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
    train(make, watch=watch)
    for means, weights in found:
        model = make().eval()
        model.load_state_dict(weights)
        with evaluated(model) as measured:
            analyses = [tlc.analyze(measured, ids, k=4) for ids in PROMPTS.values()]
        for index, sublayer in enumerate(("block", "attn", "mlp")):
            for name, quantity in (("coupling", "values"), ("null", "null"), ("excess", "excess")):
                truth = np.mean([one.coupling.mean(quantity)[index, 0, 0].item() for one in analyses])
                assert means[f"{name}/{sublayer}/k4"] == pytest.approx(truth, abs=1e-6)
        assert means["lss/block"] == pytest.approx(
            np.mean([one.linearity.path("block")[-1] for one in analyses]), rel=1e-5
        )
        assert means["ed"] == pytest.approx(np.mean([one.growth.expodistance[-1] for one in analyses]), rel=1e-4)
    assert found[0][0]["excess/block/k4"] != found[1][0]["excess/block/k4"]  # the weights moved, and it was seen


@needs_bridge
def test_a_huggingface_model_is_seen_as_it_computes():
    """The bridge's logits are the model's own, at every step: for NeoX too, whose bridge copies weights."""
    model, ids = neox().eval(), torch.tensor([PROMPTS["one"]])
    for _ in range(2):
        with evaluated(model) as measured, torch.no_grad():
            gap = (measured(ids, return_type="logits") - model(ids).logits).abs().max()
        assert gap < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)


@needs_bridge
def test_wrappers_of_training_are_seen_through_and_autocast_and_no_grad_do_not_act():
    model = llama().train()
    plain = tlc.TrainingMonitor(model, PROMPTS, k=4, verbose=False).measure(0)
    wrapped = tlc.TrainingMonitor(torch.compile(torch.nn.DataParallel(model)), PROMPTS, k=4, verbose=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        again = wrapped.measure(0)
    with torch.inference_mode():
        once_more = wrapped.measure(0)
    for name in set(plain) - {"seconds"}:
        assert again[name] == once_more[name] == plain[name]


@needs_bridge
def test_a_trainer_runs_as_without_the_callback(tmp_path: Path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, VOCABULARY, (16, 8)).tolist()]

    def run(watch: bool) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model = llama(2)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        monitor = tlc.TrainingMonitor(model, PROMPTS, every=2, k=4, verbose=False) if watch else None
        callbacks = [] if monitor is None else [monitor.as_trainer_callback()]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], monitor

    alone, _ = run(False)
    watched, monitor = run(True)
    assert watched == alone and len(alone) == 5
    assert monitor.table()["step"].drop_duplicates().tolist() == [0, 2, 4]


@needs_bridge
def test_a_trainer_of_another_model_is_refused(tmp_path: Path):
    pytest.importorskip("accelerate")
    callback = tlc.TrainingMonitor(llama(2), PROMPTS, k=4, verbose=False).as_trainer_callback()
    with pytest.raises(ArgumentError, match="the model that the Trainer trains"):
        callback.on_train_begin(None, None, None, model=llama(2))


def training_tool() -> Any:
    """TransformerLens's own, where it is in this generation."""
    for name in ("transformer_lens.tools.training", "transformer_lens.train"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


@pytest.mark.parametrize("make", OWN)
def test_transformer_lenss_training_tool_is_watched_from_around(make: Callable[[], Any]):
    tool = training_tool()
    config_class = getattr(tool, "TrainConfig", None) or tool.HookedTransformerTrainConfig
    config = config_class(num_epochs=1, batch_size=2, print_every=None, device="cpu", max_steps=5)
    data = [{"tokens": row} for row in torch.randint(0, VOCABULARY, (12, 8))]

    def run(watch: bool) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(0)
        model = make()
        if not watch:
            tool.train(model, config, data)
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), None
        with tlc.TrainingMonitor(model, PROMPTS, every=2, k=4, verbose=False).attached() as monitor:
            tool.train(model, config, data)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), monitor

    (alone, _), (watched, monitor) = run(False), run(True)
    assert torch.equal(watched, alone)
    assert monitor.table()["step"].drop_duplicates().tolist() == [0, 2, 4, 6]


def test_another_models_optimiser_is_not_counted():
    model, other = fresh(), torch.nn.Linear(2, 2)
    monitor = tlc.TrainingMonitor(model, PROMPTS, every=1, k=4, verbose=False)
    with pytest.warns(UserWarning, match="no optimiser of the monitored model"), monitor.attached():
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
    assert monitor.calls == 1  # on entry


def fresh() -> Any:
    """A model that is watched as it is: a HookedTransformer where there are such, so that older lanes watch one."""
    return bridge() if _hooked_transformer() is None else hooked()


def test_the_store_is_a_sweeps_and_goes_on(untyped: None, tmp_path: Path):
    _, monitor = train(fresh, watch=monitored(every=4, store=tmp_path / "run", name="run"))
    store = tlc.SweepStore(tmp_path / "run")
    assert sorted({(cell.model, cell.step) for cell in store.cells()}) == [("run", 0), ("run", 4), ("run", 8)]
    table = monitor.table()
    assert len(table) == 3 * 2 * 3 and set(table["sublayer"]) == {"block", "attn", "mlp"}  # steps, prompts, sublayers
    _, in_memory = train(fresh, watch=monitored(every=4, name="run"))
    columns = ["step", "prompt_id", "sublayer", "coupling", "null", "excess", "lss", "ed"]
    kept, direct = (
        each.sort_values(columns[:3])[columns].reset_index(drop=True) for each in (table, in_memory.table())
    )
    assert kept.equals(direct)
    later = monitored(every=4, store=tmp_path / "run", name="run", resume=True)(fresh())
    later.measure(8)  # once more, after a checkpoint
    again = later.table().query("step == 8").reset_index(drop=True)
    assert len(again) == 6 and not again["coupling"].equals(table.query("step == 8")["coupling"].reset_index(drop=True))
    later.measure(12)
    assert later.table()["step"].drop_duplicates().tolist() == [0, 4, 8, 12]
    scores = table[["model", "step"]].drop_duplicates().assign(score=[3.0, 2.0, 2.5])
    assert tlc.correlate(table, scores).of("excess block K=4")["n"] == 3


@pytest.mark.usefixtures("unchecked")
def test_a_run_does_not_begin_where_another_of_its_name_is(tmp_path: Path):
    """Whatever the other has measured: another prompt, or nothing but failures."""
    first = tlc.TrainingMonitor(fresh(), {"one": PROMPTS["one"]}, k=4, store=tmp_path, verbose=False)
    first.measure(200)
    name = first.name
    refusal = rf"has a run named '{name}' already, steps 200 to 200; allowed: another name=, or resume=True"
    with pytest.raises(StoreError, match=refusal):
        tlc.TrainingMonitor(fresh(), {"two": PROMPTS["two"]}, store=tmp_path, verbose=False)
    tlc.TrainingMonitor(fresh(), PROMPTS, store=tmp_path, name="another", verbose=False)
    (path,) = (tmp_path / "cells").iterdir()
    path.rename(tmp_path / "failed" / path.name)
    store = tlc.SweepStore(tmp_path)
    store.fail(Cell(name, (1, 2), step=7), ValueError("no"))
    with pytest.raises(StoreError, match="steps 7 to 7"):
        tlc.TrainingMonitor(fresh(), PROMPTS, store=tmp_path, verbose=False)


def test_of_two_runs_at_once_the_second_replaces_nothing_of_the_first(tmp_path: Path):
    first, second = (
        tlc.TrainingMonitor(fresh(), {"one": PROMPTS["one"]}, k=4, store=tmp_path, verbose=False) for _ in range(2)
    )
    with torch.no_grad():
        second.model.blocks[0].mlp.W_out.mul_(2.0)
    first(0)
    (path,) = (tmp_path / "cells").iterdir()
    whole = path.read_bytes()
    with pytest.warns(
        UserWarning, match=f"another run named '{first.name}' has written it to .*allowed: another name="
    ):
        second(0)
    assert path.read_bytes() == whole
    first(0)  # its own it may replace
    assert path.read_bytes() != whole


@pytest.mark.parametrize("kept", [True, False])
def test_a_prompt_that_fails_after_one_that_does_not_is_counted_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: bool
):
    def analyze(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
        if prompt.tolist() == PROMPTS["two"]:
            raise MemoryError("no room")
        return tlc.analyze(model, prompt, **options)

    monkeypatch.setattr("tlcoupling.training.monitor.analyze", analyze)
    monitor = tlc.TrainingMonitor(fresh(), PROMPTS, k=4, store=tmp_path if kept else None)
    with pytest.warns(UserWarning, match="step 0: prompt 'two' could not be measured: MemoryError: no room"):
        means = monitor(0)
    assert "1 of 2 prompts failed" in capsys.readouterr().err
    table = monitor.table()
    assert table["status"].value_counts().to_dict() == {"measured": 3, "failed": 1}
    (failed,) = table.query("status == 'failed'").to_dict("records")
    assert (failed["prompt"], failed["step"], failed["error"]) == ("[3, 3, 4, 5, 6]", 0, "MemoryError: no room")
    (row,) = table.query("sublayer == 'mlp'").to_dict("records")
    assert means["excess/mlp/k4"] == row["excess"]


def test_a_step_that_cannot_be_measured_at_all_is_a_failure_of_every_prompt(monkeypatch: pytest.MonkeyPatch):
    monitor = tlc.TrainingMonitor(fresh(), PROMPTS, k=4, verbose=False)

    def gone(model: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("tlcoupling.training.monitor.evaluated", gone)
    with pytest.warns(UserWarning, match="step 0 could not be measured: RuntimeError: the device is gone"):
        assert set(monitor(0)) == {"seconds"}
    assert monitor.table()["error"].tolist() == ["RuntimeError: the device is gone"] * 2


def test_numbers_go_to_loggers_and_the_cost_is_printed(capsys: pytest.CaptureFixture[str]):
    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

    class Broken:
        def log(self, values: dict[str, float], step: int) -> None:
            raise OSError("no connection")

    logged: list[tuple[int, dict[str, float]]] = []
    scalars: list[tuple[str, float, int]] = []
    monitor = tlc.TrainingMonitor(fresh(), PROMPTS, k=4, loggers=[Run(), Writer(), Broken()])
    with pytest.warns(UserWarning, match="Broken did not log step 100: OSError: no connection"):
        means = monitor(100)
    assert monitor(101) is None
    ((step, values),) = logged
    numbers = {f"tlcoupling/{name}": value for name, value in means.items()}
    assert step == 100 and values == {**numbers, "tlcoupling/step": 100}
    assert scalars == [(name, value, 100) for name, value in numbers.items()]
    printed = capsys.readouterr().err
    assert printed.startswith(f"step 100: block/k4 {means['coupling/block/k4']:.4f} (null {means['null/block/k4']:.4f}")
    assert f"{means['seconds']:.2f} s, " in printed and "% of the run so far" in printed
    assert repr(monitor).endswith(f"1 steps measured in {monitor.seconds:.1f} s)")


def test_a_run_that_diverges_is_recorded_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = fresh().train()
    monitor = tlc.TrainingMonitor(model, PROMPTS, k=4, store=tmp_path, name="run")
    with torch.no_grad():
        model.blocks[1].mlp.W_out.fill_(torch.nan)
    with pytest.warns(UserWarning, match="step 100: prompt 'two' could not be measured: NonFinite"):
        means = monitor.measure(100)
    assert set(means) == {"seconds"} and model.training
    assert "2 of 2 prompts failed" in capsys.readouterr().err
    (one, two) = tlc.SweepStore(tmp_path).failures()
    assert one.cell.step == two.cell.step == 100 and "NonFiniteActivationError" in one.error
    assert set(monitor.table()["status"]) == {"failed"}


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monitor = tlc.TrainingMonitor(fresh(), PROMPTS, k=4, store=tmp_path, verbose=False)

    def full(*args: Any) -> None:
        raise StoreError("no space left on device")

    monkeypatch.setattr(tlc.SweepStore, "save", full)
    with pytest.warns(UserWarning, match="step 0: prompt 'one' was not stored: no space left"):
        means = monitor(0)
    assert "excess/block/k4" in means


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"loggers": [3]}, "loggers=3"),
        ({"prompts": []}, "prompts="),
        ({"prompts": [[1, VOCABULARY]]}, f"token ids from 0 to {VOCABULARY - 1}"),
        ({"k": 0}, "k="),
        ({"steps": 3}, "settings='steps'.*one of k, tokens"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused_before_training(changes: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.TrainingMonitor(**{"model": fresh(), "prompts": PROMPTS, "verbose": False, **changes})


@pytest.mark.usefixtures("unchecked")
def test_a_setting_that_the_model_does_not_allow_ends_the_first_call():
    monitor = tlc.TrainingMonitor(fresh(), PROMPTS, k=1000, verbose=False)
    with pytest.raises(ArgumentError, match="k"):
        monitor(0)
    for step in (-1, 0.5, True):
        with pytest.raises(ArgumentError, match="step="):
            monitor.measure(step)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_watched_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        tlc.TrainingMonitor(torch.nn.Linear(2, 2), PROMPTS)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    )
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        tlc.TrainingMonitor(encoder, PROMPTS)


@needs_bridge
def test_strings_need_a_tokenizer():
    model = llama(2)
    monitor = tlc.TrainingMonitor(model, ["w5 w7 w9"], k=4, tokenizer=tiny_tokenizer(), verbose=False)
    monitor(0)
    assert monitor.table()["prompt"].iloc[0] == "[5, 7, 9]"
    with pytest.raises(ArgumentError, match="no tokenizer"):
        tlc.TrainingMonitor(model, ["w5 w7 w9"])


@pytest.mark.slow
def test_nothing_of_a_measurement_stays_in_memory(tmp_path: Path):
    """60 calls: no tensor is left beyond the model's own, and the process does not grow."""
    import psutil

    model = (hooked if _transformer_bridge() is None else gpt2)().train()
    monitor = tlc.TrainingMonitor(
        model, {"one": PROMPTS["one"]}, every=1, k=2, sublayers="mlp", store=tmp_path, verbose=False
    )

    def alive() -> int:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    def resident() -> float:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    for step in range(20):
        monitor(step)
    tensors, size = alive(), resident()
    for step in range(20, 80):
        monitor(step)
    assert alive() <= tensors
    # a bridge that stayed would be 0.3 MiB of weights and as much of modules: 60 of them over 30 MiB
    assert resident() - size < 10
