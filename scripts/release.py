"""Write what a release repeats: the version and the repository's address, from ``pyproject.toml`` into other files.

    python scripts/release.py                 # write them into CITATION.cff and the notebooks
    python scripts/release.py --check         # fail where a file differs
    python scripts/release.py --tag v0.2.0    # also fail if the tag, the changelog or the citation's date do not fit

`make release-check` runs the last two, and then builds, checks and installs the package.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BRANCH = "main"
COLAB = "https://colab.research.google.com"
CLONE = "In Colab, upload this notebook and a wheel (`python -m build --wheel` in a clone writes one to `dist/`)."


def setting(name: str) -> str:
    """Return ``version`` or ``repository`` from ``pyproject.toml``, the only file where they are set."""
    return re.findall(rf'^{name} = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[0]


def addresses() -> dict[str, str]:
    """Return the package's links by their names on a package index; none before the repository's address is set."""
    repository = setting("repository").rstrip("/")
    if not repository:
        return {}
    if not (parts := re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+)", repository)):
        raise SystemExit(f"repository = {repository!r} in pyproject.toml; allowed: https://github.com/OWNER/NAME")
    return {
        "Repository": repository,
        "Documentation": f"https://{parts[1].lower()}.github.io/{parts[2]}/",
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{BRANCH}/CHANGELOG.md",
    }


def readme() -> str:
    """Return the readme, with links into the clone as links into the repository where its address is set."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not (links := addresses()):
        return text
    files = rf"{links['Repository']}/%s/{BRANCH}/\1"
    text = re.sub(r"(?<=!\[)([^]]*\]\()(?!https?:|#)", rf"\1{links['Repository']}/raw/{BRANCH}/", text)
    return re.sub(r"(?<=\]\()(?!https?:|#)([^)]+)", files % "blob", text)


def badge(notebook: Path) -> str:
    """Return the line of a notebook's first cell that says how to open it in Colab."""
    if not (links := addresses()):
        return CLONE
    path = f"{links['Repository'].removeprefix('https://github.com')}/blob/{BRANCH}/demos/{notebook.name}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github{path})"


def written() -> dict[Path, str]:
    """Return each file that repeats a setting, with the text that it should have."""
    files = {}
    for notebook in sorted((ROOT / "demos").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        line = rf"(?<=\")(\[!\[Open in Colab|{re.escape(CLONE[:16])}).*(?=\\n\",$)"
        files[notebook] = re.sub(line, lambda _, notebook=notebook: badge(notebook), text, count=1, flags=re.MULTILINE)
    citation = ROOT / "CITATION.cff"
    text = re.sub(r"^(repository-code|url): .*\n", "", citation.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = f"version: {setting('version')}\n"
    for key, name in (("repository-code", "Repository"), ("url", "Documentation")):
        lines += f'{key}: "{addresses()[name]}"\n' if addresses() else ""
    files[citation] = re.sub(r"^version: .*\n", lines, text, flags=re.MULTILINE)
    return files


def faults(tag: str | None) -> list[str]:
    """Return what a release still lacks; without a tag, only which files differ from the settings."""
    found = [
        f"{path.relative_to(ROOT)} differs: run python scripts/release.py"
        for path, text in written().items()
        if path.read_text(encoding="utf-8") != text
    ]
    if tag is None:
        return found
    version = setting("version")
    if tag != f"v{version}":
        found.append(f"the tag {tag} is not v{version}, the version of pyproject.toml")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    if not dated:
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    elif f"date-released: {dated[1]}" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace('"', ""):
        found.append(f"CITATION.cff has no 'date-released: {dated[1]}', the date of CHANGELOG.md")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tag")
    given = parser.parse_args()
    if given.check or given.tag:
        print(*(found := faults(given.tag)), sep="\n")
        return bool(found)
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
