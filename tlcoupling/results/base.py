"""The base of all results: long-form tables, provenance, saving and loading; ``files`` is the file format.

A result is a frozen dataclass. ``_axes`` names the axes of each tensor field, and ``_coords`` gives the labels of each
axis. ``to_dataframe``, ``to_xarray``, ``save`` and ``load`` work from these two, so new results need no code for them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tlcoupling.errors import ArgumentError
from tlcoupling.results.display import draw, markup
from tlcoupling.results.files import damage_reported, parse_file, read_bytes, write_file
from tlcoupling.results.typed import build

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure


@functools.cache  # reading a package's metadata takes a disk access
def _versions() -> Mapping[str, str]:
    """Return the versions of the packages that affect the numbers."""
    packages = ("tlcoupling", "torch", "transformer-lens", "transformers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class Provenance:
    """Where a number came from.

    Attributes:
        model_name: the model's own name (``cfg.model_name``).
        weight_processing: how the weights were processed before the measurement; folding norms and centring writing
            weights change the Jacobians.
        tokens: token ids of the prompt.
        str_tokens: the same as text, one by one: bytes of a character that several tokens share become U+FFFD.
        text: the prompt as text, decoded whole; empty if unknown.
        settings: the arguments of the call. If user hooks acted, also ``fwd_hooks`` (their names, as given to
            ``trace``) and ``hooked_layers`` (the blocks whose Jacobians they changed).
        engine: the engine of each sublayer, ``{"block": "analytic", ...}``; empty if no Jacobian was needed.
        seconds: wall-clock time of the call.
        versions: versions of the packages that affect the numbers.
        verified: True if the result was read from a file whose checksum matched, False if that file has no checksum
            (written before there were any), None if it was not read from a file. Not saved.
    """

    model_name: str
    weight_processing: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    str_tokens: tuple[str, ...] = ()
    text: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=_versions)
    verified: bool | None = field(default=None, compare=False, metadata={"saved": False})


def engines_of_prompts(reports: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Merge per-prompt engine reports into one for a ``Provenance``; name every engine used.

    Args:
        reports: ``engine`` of each prompt, by the prompt's name.

    Returns:
        The engine of each sublayer if all prompts used the same one. Otherwise a list of all engines, each with its
        number of prompts and the first of them.
    """
    merged = {}
    for sublayer in dict.fromkeys(name for report in reports.values() for name in report):
        by_engine: dict[str, list[str]] = {}
        for prompt, report in reports.items():
            by_engine.setdefault(report.get(sublayer, "none"), []).append(prompt)
        parts = (
            f"{engine} ({len(prompts)} of {len(reports)} prompts, first {prompts[0]!r})"
            for engine, prompts in by_engine.items()
        )
        merged[sublayer] = next(iter(by_engine)) if len(by_engine) == 1 else ", ".join(parts)
    return merged


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """A measurement: tensors with named axes, and their provenance."""

    provenance: Provenance

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class by name, so that ``load`` can look it up."""
        super().__init_subclass__(**kwargs)
        Result._kinds[cls.__name__] = cls

    def _coords(self) -> dict[str, Sequence[Any]]:
        """Return the labels of each axis."""
        raise NotImplementedError

    def _arrays(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """Return all tensors that are not None, measured and derived, with their axes."""
        declared = {**self._axes, **self._derived}
        return {name: (axes, value) for name, axes in declared.items() if (value := getattr(self, name)) is not None}

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a long-form table: one row per number, with columns ``quantity``, one per axis, and ``value``.

        The text of the tokens stands beside their positions: ``token`` beside ``pos``.
        """
        import pandas as pd

        coords, frames = self._coords(), []
        for name, (axes, array) in self._arrays().items():
            index = pd.MultiIndex.from_product([list(coords[axis]) for axis in axes], names=axes)
            frame = index.to_frame(index=False)
            frame.insert(0, "quantity", name)
            frame["value"] = array.detach().cpu().double().numpy().ravel()
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        for axis in table.columns.intersection(list(coords)):
            if all(isinstance(label, int) for label in coords[axis]):
                table[axis] = table[axis].astype("Int64")  # nullable: NaN of quantities without the axis stays missing
        for axis, texts in self._texts().items():
            if axis in table:
                names = table[axis].map(dict(zip(coords[axis], texts, strict=True)))
                table.insert(list(table.columns).index(axis) + 1, axis.replace("pos", "token"), names)
        table["value"] = table.pop("value")  # concat may have put later axes behind it
        return table

    def _texts(self) -> dict[str, Sequence[str]]:
        """Return the tokens' text for each axis of positions, ``pos`` and ``basis_pos``."""
        tokens: Sequence[str] | None = getattr(self, "tokens", None)
        return {axis: tokens for axis in self._coords() if axis.endswith("pos") and tokens is not None}

    def to_xarray(self) -> xarray.Dataset:
        """Return the same numbers as an ``xarray.Dataset`` with labelled axes.

        Raises:
            ImportError: xarray is not installed (``pip install xarray``).
        """
        try:
            import xarray as xr
        except ImportError as error:
            raise ImportError("to_xarray needs xarray: pip install xarray") from error
        arrays = {name: (axes, array.detach().cpu().numpy()) for name, (axes, array) in self._arrays().items()}
        used = {axis for axes, _ in arrays.values() for axis in axes}
        coords: dict[str, Any] = {axis: list(labels) for axis, labels in self._coords().items() if axis in used}
        texts = {axis: list(texts) for axis, texts in self._texts().items() if axis in used}
        coords |= {axis.replace("pos", "token"): (axis, names) for axis, names in texts.items()}
        return xr.Dataset(arrays, coords=coords, attrs={"model_name": self.provenance.model_name})

    def _repr_html_(self) -> str | None:
        """Return the headline numbers with their chance level, and a thumbnail, for a notebook."""
        return markup(self)

    def plot(self, **options: Any) -> Figure:
        """Draw the result, as ``tlcoupling.viz.figures`` does.

        Args:
            **options: those of the figure of this kind of result, such as ``token`` and ``k`` of
                ``figures.depth_coupling``.

        Raises:
            ImportError: matplotlib is not installed (``pip install matplotlib``).
            ArgumentError: an option that this figure does not have.

        Example:
            >>> tlc.depth_coupling(trace).plot()  # doctest: +SKIP
        """
        return draw(self, **options)

    def save(self, path: str | Path) -> Path:
        """Write the result to one safetensors file, atomically.

        Args:
            path: the file to write; its folder must exist.

        Returns:
            The path written.

        Raises:
            ResultFileError: the file cannot be written; the message says why.
        """
        return write_result(self, path)


@dataclass(frozen=True, repr=False, eq=False)
class LabelledResult(Result):
    """A result that holds the names and labels of its axes itself, because they depend on what was measured.

    Attributes:
        axes: names of the axes of the tensors.
        labels: labels of each axis.
    """

    axes: tuple[str, ...] = field(kw_only=True)
    labels: tuple[tuple[Any, ...], ...] = field(kw_only=True)

    _quantities: ClassVar[tuple[str, ...]] = ()

    def _arrays(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        return {name: (self.axes, getattr(self, name)) for name in self._quantities}

    def _coords(self) -> dict[str, Sequence[Any]]:
        return dict(zip(self.axes, self.labels, strict=True))


def write_result(result: Result, path: str | Path, note: Mapping[str, Any] | None = None) -> Path:
    """Save a result, with a note in the header that ``read_result`` returns.

    Args:
        result: the result.
        path: the file to write; its folder must exist.
        note: facts about the result, of JSON's types.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    tensors, header = _flatten(result)
    return write_file(path, tensors, header if note is None else {**header, "note": note})


def load(path: str | Path) -> Any:
    """Read a result of any kind that ``save`` wrote, and check it against its checksum.

    Files written before there were checksums load with a warning: their numbers cannot be verified, and
    ``provenance.verified`` is False.

    Raises:
        ResultFileError: the file is missing, damaged, or not a tlcoupling result.
    """
    result = read_result(path)[0]
    if not result.provenance.verified:
        warnings.warn(
            "a result file without a checksum was loaded: it was written by an early version of tlcoupling, and damage "
            "to its numbers would not be noticed",
            stacklevel=2,
        )
    return result


def read_result(path: str | Path) -> tuple[Any, Mapping[str, Any]]:
    """Read a result and the note that was written with it.

    Raises:
        ResultFileError: as ``load``.
    """
    return parse_result(read_bytes(path), path)


def parse_result(content: bytes, name: str | Path) -> tuple[Any, Mapping[str, Any]]:
    """Return the result and the note of a file with these contents.

    Args:
        content: the file's bytes.
        name: its name in messages.

    Raises:
        ResultFileError: as ``load``; also if types and shapes do not fit the kind of result.
    """
    tensors, header = parse_file(content, name)
    with damage_reported(name, "the header of "):
        result = _unflatten(header, tensors, "", "checksum" in header)
        if tensors:
            raise ValueError(f"unknown tensors {sorted(tensors)}")
        if not isinstance(note := header.get("note", {}), dict):
            raise TypeError("the note is not a mapping")
        return result, note


def _flatten(result: Result, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a result into tensors and a JSON header; a result in a field is flattened under the field's name."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"kind": type(result).__name__, "plain": {}, "nested": {}}
    for spec in fields(result):
        value = getattr(result, spec.name)
        if isinstance(value, Tensor):
            tensors[prefix + spec.name] = value.detach().cpu().contiguous()
        elif isinstance(value, Result):
            inner, header["nested"][spec.name] = _flatten(value, f"{prefix}{spec.name}.")
            tensors |= inner
        elif isinstance(value, Provenance):
            record = asdict(value)
            header["provenance"] = {one.name: record[one.name] for one in fields(value) if _is_saved(one)}
        elif _is_saved(spec):
            header["plain"][spec.name] = value
    return tensors, header


def _is_saved(spec: Field) -> bool:
    return spec.metadata.get("saved", True)


def _unflatten(header: Mapping[str, Any], tensors: dict[str, Tensor], prefix: str, verified: bool) -> Result:
    """Build the result from its header and tensors, which are removed from ``tensors``: the inverse of ``_flatten``."""
    kind = Result._kinds[header["kind"]]
    values = {name: _tuples(value) for name, value in header["plain"].items()}
    provenance = {name: _tuples(value) for name, value in header["provenance"].items()}
    values["provenance"] = build(Provenance, {**provenance, "verified": verified})
    for name, inner in header["nested"].items():
        values[name] = _unflatten(inner, tensors, f"{prefix}{name}.", verified)
    for spec in fields(kind):
        if prefix + spec.name in tensors:
            values[spec.name] = tensors.pop(prefix + spec.name)
    result = build(kind, values)
    sizes = {axis: len(labels) for axis, labels in result._coords().items()}
    for name, axes in kind._axes.items():
        value, shape = getattr(result, name), tuple(sizes[axis] for axis in axes)
        if value is not None and value.shape != shape:
            raise ValueError(f"{prefix}{name} has shape {tuple(value.shape)}, but its axes {axes} have sizes {shape}")
    return result


def _tuples(value: Any) -> Any:
    """Turn JSON's lists back into the tuples that results hold."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def check_writable(path: str | Path, argument: str) -> Path:
    """Create the folder if needed and check that it is writable, so that a long run does not fail at its end.

    Raises:
        ArgumentError: it is not writable; the message names the argument, the path and the reason.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArgumentError(argument, str(path), f"a folder that can be written to ({error})") from error
    return path
