"""Train a zoo of small transformers: does coupling correlate with validation loss at a fixed width?

    python benchmarks/zoo.py            # trains, sweeps and reports into out/zoo; a second run adds what is missing
    python benchmarks/zoo.py --k 20 --out ~/zoo             # another folder: `make clean` removes out/
    python benchmarks/zoo.py --quick --out out/zoo-quick    # about a minute; models too small to mean anything

The language has 64 words. A sentence follows one of four grammars, which its first words reveal. Each grammar is a
sparse Markov chain: every word has eight successors, with Zipf's probabilities. In between, the word 0 announces the
repetition of a span of earlier words, so induction lowers the loss. Models are Llamas. At each width they differ in
depth, in the number of training sentences (fewer sentences mean more passes over each), and in their seed. Each model
keeps its checkpoints, as HuggingFace folders named by step.

The report correlates measurements with validation loss, at the end of training and during it, with width held fixed. It
takes correlations within groups of equal width, with p-values from permuting the losses within these groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from llamas import llama, save, word_tokenizer

import tlcoupling as tlc
from tlcoupling.scores.partial_correlation import partial_correlation

VOCABULARY, GRAMMARS, SUCCESSORS, COPY = 64, 4, 8, 0
LENGTH, BATCH = 64, 16
MEASURES = ("coupling", "null", "excess", "lss", "ed")


@dataclass(frozen=True)
class Setting:
    """The models to train and measure.

    Attributes:
        widths, depths, sentences: every combination is a model; sentences: the number of different training sentences.
        steps: number of optimiser steps.
        checkpoints: steps at which a checkpoint is kept.
        prompts: number of sentences that coupling is measured on.
        k: as in ``tlc.depth_coupling``.
    """

    widths: tuple[int, ...] = (64, 96)
    depths: tuple[int, ...] = (4, 8)
    sentences: tuple[int, ...] = (512, 2048, 8192)
    steps: int = 300
    checkpoints: tuple[int, ...] = (0, 20, 50, 100, 200, 300)
    prompts: int = 4
    k: int = 10


QUICK = Setting((16, 32), (2, 3), (32, 256), 20, (0, 20), 1, 4)


@dataclass(frozen=True)
class Model:
    """One model of the zoo."""

    width: int
    depth: int
    sentences: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"w{self.width}-d{self.depth}-n{self.sentences}-s{self.seed}"


def zoo(setting: Setting) -> list[Model]:
    """Return all models, each with its own seed."""
    sizes = itertools.product(setting.widths, setting.depths, setting.sentences)
    return [Model(*size, seed) for seed, size in enumerate(sizes)]


class Language:
    """A random language; the seed fixes its grammars."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        words = np.arange(1, VOCABULARY)
        self._successors = np.stack(
            [[rng.choice(words, SUCCESSORS, replace=False) for _ in range(VOCABULARY)] for _ in range(GRAMMARS)]
        )
        odds = 1 / np.arange(1, SUCCESSORS + 1)
        self._below = np.cumsum(odds / odds.sum())

    def sentences(self, count: int, seed: int) -> torch.Tensor:
        """Return token ids ``[count, LENGTH]``."""
        rng = np.random.default_rng(seed)
        first, grammar = rng.integers(1, VOCABULARY, count).tolist(), rng.integers(GRAMMARS, size=count)
        chosen = np.searchsorted(self._below, rng.random((count, LENGTH)).clip(max=self._below[-1])).tolist()
        chance = rng.random((count, LENGTH, 3)).tolist()
        rows = zip(first, self._successors[grammar].tolist(), chosen, chance, strict=True)
        return torch.tensor([self._sentence(*row) for row in rows])

    def _sentence(
        self, first: int, grammar: list[list[int]], chosen: list[int], chance: list[list[float]]
    ) -> list[int]:
        """Return one sentence: the word at t is followed by its ``chosen[t]``-th successor, or by a repeated span."""
        words = [first]
        while (t := len(words)) < LENGTH:
            copies, size, start = chance[t]
            if t >= 16 and copies < 0.08:
                length = 4 + int(5 * size)
                begin = int(start * (t - length))
                words += [COPY, *words[begin : begin + length]]
            else:
                words.append(grammar[words[-1]][chosen[t]])
        return words[:LENGTH]


def train(model: Model, setting: Setting, language: Language, folder: Path) -> None:
    """Train one model and save its checkpoints, then its losses, which mark it as complete."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(model.seed)
    network = llama(
        model.width,
        model.depth,
        heads=model.width // 16,
        vocabulary=VOCABULARY,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
        bos_token_id=COPY,
        eos_token_id=COPY,
    )
    tokenizer = word_tokenizer(VOCABULARY, end=f"w{COPY}", bos_token=f"w{COPY}")
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    warm = max(1, setting.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / setting.steps))
    )
    data, held_out = language.sentences(model.sentences, 1), language.sentences(128, 2)
    batches = _batches(data, model.seed)
    losses = {}
    for step in range(setting.steps + 1):
        if step in setting.checkpoints:
            losses[step] = _validation(network, held_out)
            save(network, tokenizer, folder / f"step{step}")
        if step == setting.steps:
            break
        ids = next(batches)
        loss = network(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    (folder / "losses.json").write_text(json.dumps({"losses": losses}))


def _batches(data: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of one pass after another, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from data[torch.randperm(len(data), generator=generator)].split(BATCH)


@torch.no_grad()
def _validation(network: Any, held_out: torch.Tensor) -> float:
    network.eval()
    loss = float(network(held_out, labels=held_out).loss)
    network.train()
    return loss


def losses_of(folder: Path, setting: Setting) -> dict[int, float] | None:
    """Return the validation loss by step, or None if training is not complete.

    Raises:
        SystemExit: the model was trained for another number of steps, or lacks a checkpoint of the setting.
    """
    try:
        record = json.loads((folder / "losses.json").read_text())
    except (OSError, ValueError):
        return None
    losses = {int(step): loss for step, loss in record["losses"].items()}
    if max(losses) != setting.steps or not losses.keys() >= set(setting.checkpoints):
        kept = ", ".join(map(str, losses))
        raise SystemExit(
            f"{folder} holds a model trained for {max(losses)} steps with the checkpoints {kept}, which is not "
            f"replaced; allowed: --steps {max(losses)} and --checkpoints of these, or another --out"
        )
    return losses


def measure(models: list[Model], setting: Setting, language: Language, out: Path) -> pd.DataFrame:
    """Sweep all checkpoints; one row per model, step and sublayer, with width, depth and validation loss."""
    prompts = [" ".join(f"w{word}" for word in row) for row in language.sentences(setting.prompts, 3).tolist()]
    plan = tlc.Plan.of(
        {
            "models": [
                {
                    "name": str((out / "models" / one.name).resolve()),
                    "label": one.name,
                    "checkpoints": list(setting.checkpoints),
                }
                for one in models
            ],
            "prompts": {"text": prompts},
            "settings": {"k": setting.k, "tokens": [LENGTH // 2, -1], "prepend_bos": False},
            "local_files_only": True,
        }
    )
    report = tlc.sweep(plan, out / "store", progress=True)
    print(report)
    if not report.complete:
        raise SystemExit(f"not all cells were measured: {report.failed or report.unfinished}")
    table = report.store.table()
    table = table[table["key"].isin([cell.key for cell in plan.cells])]  # the store may also hold an older zoo
    means = table.groupby(["model", "step", "sublayer"], as_index=False)[list(MEASURES)].mean()
    losses = {one.name: losses_of(out / "models" / one.name, setting) or {} for one in models}
    by_name = {one.name: one for one in models}
    means["loss"] = [losses[name][step] for name, step in zip(means["model"], means["step"], strict=True)]
    for field in ("width", "depth", "sentences"):
        means[field] = [getattr(by_name[name], field) for name in means["model"]]
    return means


def at_the_end(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Correlate each measurement of the trained models with validation loss, at equal width and depth, by sublayer."""
    correlations = []
    last = table[table["step"] == setting.steps]
    for sublayer, rows in last.groupby("sublayer", sort=False):
        for name in MEASURES:
            if name == "ed" and sublayer != "block":
                continue  # expodistance exists only for blocks
            x, y = rows[name].to_numpy(float), rows["loss"].to_numpy(float)
            widths = rows["width"].tolist()
            cells = list(zip(rows["width"], rows["depth"], strict=True))
            row = {"measurement": name, "sublayer": sublayer, "r": partial_correlation(x, y).r}
            row |= {"r at equal width": partial_correlation(x, y, within=widths).r, "p": permutation_p(x, y, widths)}
            row |= {"and equal depth": partial_correlation(x, y, within=cells).r, "p ": permutation_p(x, y, cells)}
            for width in setting.widths:
                at = rows["width"].to_numpy() == width
                row[f"r, width {width}"] = partial_correlation(x[at], y[at]).r
            correlations.append(row)
    return pd.DataFrame(correlations)


def along_training(table: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation with validation loss over each model's checkpoints: mean over models and interval.

    The interval is the mean +- t(0.975) standard errors over models.
    """
    from scipy.stats import spearmanr, t

    correlations = []
    for sublayer, rows in table.groupby("sublayer", sort=False):
        for name in MEASURES:
            if name == "ed" and sublayer != "block":
                continue
            rhos = [
                spearmanr(one[name].to_numpy(float), one["loss"].to_numpy(float))[0] for _, one in rows.groupby("model")
            ]
            half = t.ppf(0.975, len(rhos) - 1) * np.std(rhos, ddof=1) / math.sqrt(len(rhos))
            row = {"measurement": name, "sublayer": sublayer, "mean rho": np.mean(rhos)}
            correlations.append(row | {"low": np.mean(rhos) - half, "high": np.mean(rhos) + half})
    return pd.DataFrame(correlations)


def permutation_p(x: np.ndarray, y: np.ndarray, groups: list[Any], draws: int = 4999, seed: int = 0) -> float:
    """Return the two-sided p-value of the correlation within groups, from permuting y within them."""
    labels = pd.factorize(pd.Series(groups))[0]
    centred = [each - pd.Series(each).groupby(labels).transform("mean").to_numpy() for each in (x, y)]
    if any(np.linalg.norm(each) == 0 for each in centred):
        return math.nan
    truth, rng = abs(centred[0] @ centred[1]), np.random.default_rng(seed)
    order, ties = np.argsort(labels, kind="stable"), labels + 0.0
    above = 0
    for _ in range(draws):
        shuffled = np.empty_like(centred[1])
        shuffled[order] = centred[1][np.argsort(ties + rng.random(len(labels)))]  # keeps groups together
        above += abs(centred[0] @ shuffled) >= truth * (1 - 1e-12)
    return (above + 1) / (draws + 1)


def write_report(table: pd.DataFrame, setting: Setting, models: list[Model], seconds: float, out: Path) -> str:
    """Write the report to ``report.md`` and return its text."""
    last = table[(table["step"] == setting.steps) & (table["sublayer"] == "block")].set_index("model")
    columns = ["width", "depth", "sentences", "loss", "coupling", "null", "excess", "lss", "ed"]
    end = at_the_end(table, setting)
    key = end[(end["sublayer"] == "block") & end["measurement"].isin(["coupling", "excess"])]
    sentences = [
        f"{row['measurement']}: r = {row['r']:+.2f} over all models, {row['r at equal width']:+.2f} at equal width "
        f"(permutation p = {row['p']:.3f}), {row['and equal depth']:+.2f} at equal width and depth "
        f"(p = {row['p ']:.3f})"
        for _, row in key.iterrows()
    ]
    text = "\n\n".join(
        [
            "# The zoo: coupling against validation loss at a fixed width",
            f"{len(models)} models, {setting.steps} steps of {BATCH} sentences of {LENGTH} words, K = {setting.k}, "
            f"{setting.prompts} prompts, 2 tokens each; {torch.get_num_threads()} thread(s), {seconds:.0f} s in this "
            "run. A negative correlation means that a larger measurement goes with a lower loss.",
            "Blocks, at the end of training, against validation loss:\n\n- " + "\n- ".join(sentences),
            "## The trained models (blocks)",
            _markdown(last[[name for name in columns if name in last]].reset_index()),
            "## Correlation with validation loss at the end of training",
            _markdown(end),
            "## During training: rank correlation with validation loss over each model's checkpoints",
            f"At steps {', '.join(map(str, setting.checkpoints))}; mean over models with its 95 % interval.",
            _markdown(along_training(table)),
        ]
    )
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def _markdown(table: pd.DataFrame) -> str:
    """Format a table as markdown, with four significant digits."""
    shown = table.map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else str(cell))
    lines = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(setting: Setting, out: Path) -> pd.DataFrame:
    """Train and measure what is missing, and report."""
    started, language, models = time.perf_counter(), Language(), zoo(setting)
    for number, model in enumerate(models, 1):
        folder, began = out / "models" / model.name, time.perf_counter()
        if losses_of(folder, setting) is None:
            train(model, setting, language, folder)
            losses = losses_of(folder, setting) or {}
            cost = time.perf_counter() - began
            print(
                f"{number} of {len(models)}: {model.name}, loss {losses[setting.steps]:.4f}, {cost:.0f} s", flush=True
            )
    table = measure(models, setting, language, out)
    table.to_csv(out / "measurements.csv", index=False)
    print(write_report(table, setting, models, time.perf_counter() - started, out))
    return table


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="models too small to mean anything; about a minute")
    for field in fields(Setting):
        kind = {"type": int} if isinstance(field.default, int) else {"type": int, "nargs": "+"}
        parser.add_argument(f"--{field.name}", **kind, metavar="N", help=f"default: {field.default}")
    parser.add_argument("--out", type=Path, default=Path("out/zoo"), help="folder of all files")
    options = parser.parse_args()
    setting = QUICK if options.quick else Setting()
    given = {field.name: getattr(options, field.name) for field in fields(Setting)}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    setting = replace(setting, **changes)
    if setting.steps not in setting.checkpoints:
        parser.error(f"--checkpoints must end with the last step, {setting.steps}")
    transformers.utils.logging.disable_progress_bar()
    run(setting, options.out)


if __name__ == "__main__":
    main()
