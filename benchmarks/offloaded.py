"""A model larger than the memory that it is given: accelerate keeps its weights on disk, read a layer at a time.

    python benchmarks/offloaded.py                  # 1.5 GiB of weights, 512 MiB of memory: about a minute
    python benchmarks/offloaded.py --layers 4 --width 512 --limit-mib 64

Writes the random float32 weights of a Llama to a temporary folder, one at a time. One process measures the model there
under a limit of its data segment (``RLIMIT_DATA``), beyond what it has taken before; another one loads it whole. The
table says what each of them took at most and how far their numbers lie apart. Needs accelerate, and Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tlcoupling as tlc

MIB = 2**20
TOKENS = torch.arange(2, 18)


def empty_model(width: int, layers: int) -> Any:
    """Return a Llama without numbers."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=1024,
        max_position_embeddings=64,
    )
    with init_empty_weights():
        return LlamaForCausalLM(config).eval()


def write(width: int, layers: int, folder: Path) -> int:
    """Write the weights, one at a time, as accelerate keeps them; return their bytes."""
    from accelerate.utils import offload_weight, save_offload_index

    index, total = {}, 0
    for seed, (name, like) in enumerate(empty_model(width, layers).named_parameters()):
        weight = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        weight = weight / like.shape[-1] ** 0.5 if like.ndim > 1 else 1 + weight / 10
        index, total = offload_weight(weight, name, str(folder), index), total + weight.nbytes
    save_offload_index(index, str(folder))
    return total


def load(model: Any, folder: Path, offloaded: bool) -> None:
    """Give a model its weights, on disk or in memory."""
    from accelerate import disk_offload
    from accelerate.utils import OffloadedWeightsLoader

    if offloaded:
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        model.load_state_dict(dict(OffloadedWeightsLoader(save_folder=str(folder))), assign=True)


def status(name: str) -> int:
    """Return a number of bytes that Linux gives of this process, such as ``VmHWM``, the most that was resident."""
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kib)


def measure(width: int, layers: int, folder: Path, limit: int) -> None:
    """Measure the model and print what came out; a limit of bytes has its weights on disk."""
    _warm()
    model = empty_model(width, layers)
    gc.collect()  # accelerate makes each weight before it empties it
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    if limit:
        most = status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    load(model, folder, bool(limit))
    began = time.perf_counter()
    trace = tlc.trace(model, TOKENS)
    coupling = tlc.depth_coupling(trace, 10, sublayers=("block", "attn", "mlp"))
    found = {
        "seconds": time.perf_counter() - began,
        "peak": status("VmHWM") - before,
        "engine": dict(coupling.provenance.engine),
        "resid": float(trace.resid.norm()),
        "coupling": coupling.values.flatten().tolist(),
    }
    print(json.dumps(found))


def _warm() -> None:
    """Load what a first call loads: libraries, threads and their buffers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    tlc.depth_coupling(tlc.trace(LlamaForCausalLM(small).eval(), TOKENS), 4)


def compare(width: int, layers: int, limit: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """Measure a model on disk and in memory; return the bytes of its weights and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        total, found = write(width, layers, Path(folder)), {}
        for name, allowed in (("on disk", limit), ("in memory", 0)):
            command = [sys.executable, __file__, "--width", str(width), "--layers", str(layers)]
            command += ["--folder", folder, "--limit-mib", str(allowed // MIB)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return total, found


def main() -> None:
    """Print the table, or measure as one of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--limit-mib", type=int, default=512)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        measure(options.width, options.layers, options.folder, options.limit_mib * MIB)
        return
    total, found = compare(options.width, options.layers, options.limit_mib * MIB)
    print(f"| weights of {total / MIB:.0f} MiB | memory allowed | peak beyond the libraries | seconds | engine |")
    print("|---|---|---|---|---|")
    for name, one in found.items():
        allowed = f"{options.limit_mib} MiB" if name == "on disk" else "any"
        engines = ", ".join(sorted(set(one["engine"].values())))
        print(f"| {name} | {allowed} | {one['peak'] / MIB:.0f} MiB | {one['seconds']:.1f} | {engines} |")
    here, there = (torch.tensor(one["coupling"]) for one in found.values())
    print(f"largest difference of two couplings: {float((here - there).abs().max()):.1e}")


if __name__ == "__main__":
    main()
