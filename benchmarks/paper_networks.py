"""What the paper's reviewers asked for, on networks small enough to train here."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import zoo
from chance import native
from paper_smollm2 import save
from scipy.stats import spearmanr

import tlcoupling as tlc
from tlcoupling.coupling import loss as loss_of_coupling

SEEDS = range(3)
WIDTH, DEPTH, K, STEPS, EVERY = 32, 4, 4, 300, 5
WEIGHTS = (0.1, 0.3, 1.0, 3.0)


def convergence(folder: Path) -> dict[str, Any]:
    """Is it a measure of convergence alone? Coupling against loss along training, and at equal loss across sizes."""
    setting = zoo.Setting(
        widths=(32, 64), depths=(4, 8), sentences=(8192,), steps=600, k=K, prompts=4,
        checkpoints=(0, 10, 20, 40, 80, 160, 300, 450, 600),
    )  # fmt: skip
    table = zoo.run(setting, Path("out/paper/zoo"))
    table = table[table["sublayer"] == "block"]
    numbers: dict[str, Any] = {"steps": setting.steps}
    sizes = {name: rows.sort_values("step") for name, rows in table.groupby("model")}
    for measure in ("excess", "lss", "ed"):
        numbers[f"rho {measure}"] = float(
            np.mean(
                [spearmanr(rows[measure].to_numpy(float), rows["loss"].to_numpy(float))[0] for rows in sizes.values()]
            )
        )
    level = max(float(rows["loss"].min()) for rows in sizes.values()) + 0.05
    numbers["level"] = level
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for rows in sizes.values():
        loss, excess = rows["loss"].to_numpy(float), rows["excess"].to_numpy(float)
        width, depth = int(rows["width"].iloc[0]), int(rows["depth"].iloc[0])
        numbers[f"w{width} d{depth} at level"] = float(np.interp(-level, -loss, excess))
        numbers[f"w{width} d{depth} last"] = float(excess[-1])
        numbers[f"w{width} d{depth} loss"] = float(loss[-1])
        half = int(rows["step"].iloc[int(np.argmax(excess >= 0.9 * excess.max()))])
        numbers[f"w{width} d{depth} step of 90 %"] = half
        numbers[f"w{width} d{depth} loss left"] = float(loss[list(rows["step"]).index(half)] - loss[-1])
        axes.plot(loss, excess, marker="o", label=f"width {width}, {depth} layers")
    axes.set(xlabel="validation loss (nats a word)", ylabel="excess coupling of blocks")
    axes.invert_xaxis()
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.legend()
    save(figure, folder / "convergence.png")
    return numbers


def small(depth: int, seed: int, **more: Any) -> Any:
    """Return a small transformer with fresh weights."""
    settings = {"n_layers": depth, "d_model": WIDTH, "n_heads": 2, "d_head": WIDTH // 2, "d_mlp": 4 * WIDTH}
    settings |= {"n_ctx": zoo.LENGTH, "d_vocab": zoo.VOCABULARY, "act_fn": "gelu"}
    return native(seed, **settings | more)


def trained(weight: float, seed: int, language: zoo.Language, rotated: bool = False) -> dict[str, float]:
    """Train one network with ``weight * coupling_loss`` added at every fifth step; return what becomes of it.

    With ``rotated``, each layer's Jacobian is turned by random rotations of its own before it is compared: the same
    work, with bases that cannot couple.
    """
    model = small(DEPTH, seed).train()
    generator = torch.Generator().manual_seed(seed)
    turns = [[torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in "uv"] for _ in range(DEPTH)]
    jacobians = loss_of_coupling._jacobians

    def turned(*arguments: Any) -> list[torch.Tensor]:
        return [u @ each @ v for each, (u, v) in zip(jacobians(*arguments), turns, strict=True)]

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    data, held_out = language.sentences(4096, 1), language.sentences(128, 2)
    batches = zoo._batches(data, seed)
    with patch.object(loss_of_coupling, "_jacobians", turned if rotated else jacobians):
        for step in range(STEPS):
            ids = next(batches)
            loss = model(ids, return_type="loss")
            if weight and step % EVERY == 0:
                loss = loss + weight * EVERY * tlc.coupling_loss(model, ids[0, :16], K)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    model.eval()
    with torch.no_grad():
        validation = float(model(held_out, return_type="loss"))
    rows = []
    for ids in language.sentences(4, 3):
        trace = tlc.trace(model, ids[:16])
        rows.append(
            [
                float(tlc.depth_coupling(trace, K, sublayers="block").mean("excess")[0, 0, 0]),
                float(tlc.linearity(trace).lss[0].mean()),
                float(tlc.growth(trace).expodistance.nanmean()),
            ]
        )
    return dict(zip(("loss", "excess", "lss", "ed"), [validation, *np.mean(rows, 0)], strict=True))


def regulariser(folder: Path) -> dict[str, Any]:
    """Training with coupling as a regulariser, for and against, beside a control that costs the same."""
    language = zoo.Language()
    runs = {"none": (0.0, False), "control": (WEIGHTS[2], True)}
    runs |= {f"{sign * weight:+g}": (sign * weight, False) for sign in (1, -1) for weight in WEIGHTS}
    numbers: dict[str, Any] = {"steps": STEPS, "seeds": len(SEEDS)}
    rows = []
    for name, (weight, rotated) in runs.items():
        table = pd.DataFrame([trained(weight, seed, language, rotated) for seed in SEEDS])
        for measure in table:
            numbers[f"{name} {measure}"] = float(table[measure].mean())
            numbers[f"{name} {measure} sd"] = float(table[measure].std())
        rows.append((name, table))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, table in rows:
        axes.errorbar(
            table["excess"].mean(),
            table["loss"].mean(),
            table["loss"].std(),
            table["excess"].std(),
            marker="o",
            label=name,
        )
    axes.set(xlabel="excess coupling of blocks", ylabel="validation loss (nats a word)")
    axes.legend(title="weight of 1 - coupling", fontsize=8)
    save(figure, folder / "regulariser.png")
    return numbers


def vision(folder: Path) -> dict[str, Any]:
    """Small vision transformers on scikit-learn's digits: coupling beside accuracy along training."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    checkpoints = (0, 20, 50, 100, 200, 400)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=128, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        for step in range(checkpoints[-1] + 1):
            if step in checkpoints:
                model.eval()
                with torch.no_grad():
                    accuracy = float((model(pixels[test]).logits.argmax(-1) == labels[test]).float().mean())
                found = [
                    tlc.depth_coupling(tlc.trace(model, {"pixel_values": pixels[one][None]}), K, sublayers="block")
                    for one in test[:4]
                ]
                excess = float(np.mean([float(each.mean("excess")[0, 0, 0]) for each in found]))
                rows.append({"seed": seed, "step": step, "accuracy": accuracy, "excess": excess})
                model.train()
            batch = train[torch.randint(len(train), (64,))]
            loss = torch.nn.functional.cross_entropy(model(pixels[batch]).logits, labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    table = pd.DataFrame(rows)
    mean, sd = table.groupby("step").mean(), table.groupby("step").std()
    numbers: dict[str, Any] = {"steps": checkpoints[-1], "seeds": len(SEEDS)}
    for step in checkpoints:
        numbers |= {f"{name} {step}": float(mean[name][step]) for name in ("accuracy", "excess")}
        numbers[f"excess sd {step}"] = float(sd["excess"][step])
    numbers["rho"] = float(
        np.mean([spearmanr(each["accuracy"], each["excess"])[0] for _, each in table.groupby("seed")])
    )
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    left.errorbar(mean.index, mean["excess"], sd["excess"], marker="o", label="excess coupling")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="step", ylabel="excess coupling of blocks, last token")
    right = left.twinx()
    right.plot(mean.index, mean["accuracy"], color="tab:orange", marker="s")
    right.set_ylabel("test accuracy", color="tab:orange")
    save(figure, folder / "vision.png")
    return numbers


def trivial(folder: Path) -> dict[str, Any]:
    """The negative control: a network whose blocks scale their input, x -> (1 + a) x, beside fresh weights."""
    scale, depth = 0.2, 12
    scaling = small(depth, 0, normalization_type=None, act_fn="relu").double()
    with torch.no_grad():
        for block in scaling.blocks:
            for parameter in block.parameters():
                parameter.zero_()
            block.mlp.W_in[:, :WIDTH], block.mlp.W_in[:, WIDTH : 2 * WIDTH] = torch.eye(WIDTH), -torch.eye(WIDTH)
            block.mlp.W_out[:WIDTH], block.mlp.W_out[WIDTH : 2 * WIDTH] = (
                scale * torch.eye(WIDTH),
                -scale * torch.eye(WIDTH),
            )
    fresh = small(depth, 0).double()
    ids = torch.arange(16)
    numbers: dict[str, Any] = {"scale": scale, "layers": depth}
    for name, model in (("scaling", scaling), ("fresh", fresh)):
        trace = tlc.trace(model, ids)
        coupling = tlc.depth_coupling(trace, K, sublayers="block")
        growth = tlc.growth(trace)
        numbers[f"{name} lss"] = float(tlc.linearity(trace).lss[0].mean())
        numbers[f"{name} ed"] = float(growth.expodistance.mean())
        numbers[f"{name} rate"] = float(growth.rate.mean())
        numbers[f"{name} determined"] = float(coupling.determined.float().mean())
        numbers[f"{name} excess"] = float(coupling.mean("excess")[0, 0, 0])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, model in (("scaling", scaling), ("fresh", fresh)):
        growth = tlc.growth(tlc.trace(model, ids))
        axes.plot(growth.norms.mean(-1), marker="o", label=name)
    axes.set(xlabel="depth", ylabel="norm of the stream, mean over tokens", yscale="log")
    axes.legend()
    save(figure, folder / "trivial.png")
    return numbers
