#!/usr/bin/env bash
# The notebooks' first cell where Colab's versions are installed (constraints/colab.txt): from a clone, from a wheel in the
# folder, and from an index, here a folder that is served on this machine. It may change none of these versions. The next
# cell runs without the permission to write to the package.  scripts/colab.sh PYTHON WHEEL
# PYTHON has the development set-up.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1") wheel=$(realpath "$2")
tmp=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 IPYTHONDIR="$tmp/ipython"

step() {
    printf '%4d s  %s\n' "$SECONDS" "$1"
}

cell() { # the code of the N-th code cell of the first notebook
    "$python" -c 'import json, sys
cells = [c for c in json.load(open("demos/01_quickstart.ipynb"))["cells"] if c["cell_type"] == "code"]
print("".join(cells[int(sys.argv[1])]["source"]))' "$1"
}

read_only() { # a command that may not write to the installed package; root then lacks its right to write everywhere
    local package
    package=$("$tmp/venv/bin/python" -c 'import importlib.util as i; print(*i.find_spec("tlcoupling").submodule_search_locations)')
    chmod -R a-w "$package"
    if [ "$(id -u)" = 0 ]; then
        setpriv --bounding-set=-dac_override --inh-caps=-dac_override "$@"
    else
        "$@"
    fi
    chmod -R u+w "$package"
}

step "an environment with Colab's versions"
torch=$("$python" -c 'import torch; print(torch.__version__)')
"$python" -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "torch==${torch%+*}"
"$(dirname "$python")/uv" --quiet pip install --python "$tmp/venv/bin/python" -r constraints/colab.txt
versions() { "$tmp/venv/bin/python" -m pip list --format=freeze --disable-pip-version-check | grep -iE '^(torch|numpy|pandas|ipython)=='; }
versions | tee "$tmp/before.txt"

git clone --quiet --no-hardlinks . "$tmp/clone"
mkdir -p "$tmp/beside" "$tmp/alone" "$tmp/index/simple/tlcoupling"
cp "$wheel" "$tmp/beside"
cp "$wheel" "$tmp/index/simple/tlcoupling"
name=$(basename "$wheel")
echo "<a href=\"$name\">$name</a>" >"$tmp/index/simple/tlcoupling/index.html"
"$python" -u -m http.server 0 --bind 127.0.0.1 --directory "$tmp/index" >"$tmp/server.log" 2>/dev/null &
server=$!
until grep -q port "$tmp/server.log"; do sleep 0.1; done
port=$(sed -nE 's/.* port ([0-9]+) .*/\1/p' "$tmp/server.log")

cell 0 >"$tmp/first.ipy"
cell 1 >"$tmp/second.ipy"
for folder in clone/demos beside alone; do
    step "the first cell, in $folder"
    (
        cd "$tmp/$folder"
        [ "$folder" != alone ] || export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-} http://127.0.0.1:$port/simple/"
        "$tmp/venv/bin/ipython" --colors=NoColor "$tmp/first.ipy" >"$tmp/cell.log" 2>&1 || { tail -n 40 "$tmp/cell.log"; exit 1; }
        versions | diff "$tmp/before.txt" -
        read_only "$tmp/venv/bin/python" -c 'import importlib.metadata, os, pathlib, tlcoupling as tlc
package = pathlib.Path(tlc.__file__).parent
assert not os.access(package, os.W_OK), package
print("tlcoupling", importlib.metadata.version("tlcoupling"), tlc.trace)'
    )
    [ "$folder" = alone ] || "$tmp/venv/bin/python" -m pip uninstall --quiet --yes tlcoupling
done

step "the second cell, with no write access to the package"
(cd "$tmp/alone" && read_only "$tmp/venv/bin/ipython" --colors=NoColor "$tmp/second.ipy")
step "done"
