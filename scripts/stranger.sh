#!/usr/bin/env bash
# A stranger's path, timed: build the package, test the sdist, open its documentation from disk, install the wheel with its core
# dependencies alone into an empty environment, measure a model from a folder, and run a notebook's first cell.
# scripts/stranger.sh PYTHON [FOLDER]
# PYTHON has the development set-up; the package is written to FOLDER, dist/ by default.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1") dist=$(realpath -m "${2:-dist}")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() {
    printf '%4d s  %s\n' "$SECONDS" "$1"
}

step "build, and twine check"
rm -rf "$dist"
"$python" -m build --outdir "$dist" . >"$tmp/build.log" || { tail -n 40 "$tmp/build.log"; exit 1; }
"$python" -m twine check --strict "$dist"/*

step "the sdist holds what git tracks, and nothing else"
tar --extract --gzip --file "$dist"/*.tar.gz --directory "$tmp"
sdist=$(echo "$tmp"/tlcoupling-*/)
diff <(cd "$sdist" && find . -type f ! -name PKG-INFO | sed 's#^\./##' | LC_ALL=C sort) <(git ls-files | LC_ALL=C sort)

# The same files pass the same tests. So collect them all, which imports each, and run some that read files of many folders.
step "the sdist's tests"
(
    cd "$sdist"
    "$python" -m pytest -q -p no:cacheprovider --collect-only >"$tmp/collected.log" || { tail -n 20 "$tmp/collected.log"; exit 1; }
    tail -n 1 "$tmp/collected.log"
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" tests/linalg tests/test_{docs,errors,layout,release}.py tests/results
)

step "the sdist's documentation, opened from disk in Chromium"
(cd "$sdist" && NO_MKDOCS_2_WARNING=1 "$python" -m pytest -q -p no:cacheprovider tests/test_docs.py -k opens_from_disk) |
    tee "$tmp/docs.log"
grep --quiet '1 passed' "$tmp/docs.log" # and not skipped, for want of a browser

step "an empty environment: the wheel with core dependencies alone"
"$python" -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
    torch==2.13.0 "$dist"/*.whl
"$tmp/venv/bin/tlcoupling" --version --verbose

step "a first report, of a model in a folder"
(
    cd "$tmp"
    "$tmp/venv/bin/python" - <<'MODEL'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(bos_token="w1", eos_token="w2", pad_token="w3", unk_token="w0")
PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("model")
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained("model")
MODEL
    "$tmp/venv/bin/tlcoupling" report model --prompt "w5 w6 w7 w8 w9" --output report >report.log || { tail report.log; exit 1; }
    ls -l report
)

step "a notebook's first cell, where Colab's versions are installed"
scripts/colab.sh "$python" "$dist"/*.whl
step "done"
