"""Every error that tlcoupling raises on purpose, under one base class."""

from __future__ import annotations


class TLCouplingError(Exception):
    """Base class of all errors that tlcoupling raises on purpose."""


class ArgumentError(TLCouplingError, ValueError):
    """An argument has a value that is not allowed.

    Args:
        name: The argument as the caller wrote it, such as ``"layer"``.
        value: The rejected value.
        allowed: The allowed values, as the end of the sentence "allowed: ...".

    Example:
        >>> print(ArgumentError("layer", 40, "an int from -30 to 29"))
        layer=40 is not allowed; allowed: an int from -30 to 29
    """

    name: str
    value: object
    allowed: str

    def __init__(self, name: str, value: object, allowed: str) -> None:
        """Store the three parts and format them as one sentence."""
        self.name, self.value, self.allowed = name, value, allowed
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{name}={shown} is not allowed; allowed: {allowed}")

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, object, str]]:
        """Pickle the three parts. The default would pickle the message alone, and a process pool would fail."""
        return type(self), (self.name, self.value, self.allowed)


class ModelLoadError(TLCouplingError):
    """A model could not be loaded: unknown name, missing file or missing package."""


# Why a model has no residual Jacobian here; docs/models.md explains each. The message begins with it.
REASONS = (
    "not a hooked model",
    "encoder-decoder",
    "looped depth",
    "no blocks",
    "several streams",
    "changed between blocks",
    "quantised weights",
    "sharded weights",
    "weights not in memory",
    "inference tensors",
    "training mode",
    "forward pass fails",
)


class UnsupportedModelError(TLCouplingError):
    """The model is of an unsupported kind, or in a state that cannot be measured."""

    @property
    def reason(self) -> str | None:
        """Which of ``REASONS`` it is; None where a single measurement is refused, and not the model."""
        reason = str(self).partition(":")[0]
        return reason if reason in REASONS else None


class ResidualIdentityError(TLCouplingError):
    """The hooked sublayer writes do not add up to the block output."""


class NonFiniteActivationError(TLCouplingError):
    """The forward pass holds NaN or infinite activations."""


class MissingHookError(TLCouplingError):
    """A cache lacks a hook point that the measurement needs."""


class StaleTraceError(TLCouplingError):
    """The model has changed since the trace was taken, so the trace no longer describes it."""


class HookError(TLCouplingError):
    """A user hook cannot be differentiated: it changes a shape or leaves the autograd graph."""


class DegenerateSpectrumError(TLCouplingError):
    """Singular values coincide, so their singular vectors have no derivative."""


class DerivativeError(TLCouplingError):
    """The derivative that autograd gives is not that of the function that the model computes."""


class CertificateError(TLCouplingError):
    """An analytic Jacobian does not match the model's own derivative."""


class InsufficientMemoryError(TLCouplingError):
    """A measurement needs more memory than is free. Raised before any work starts."""


class EveryPromptFailedError(TLCouplingError):
    """None of many prompts could be measured."""


class ResultFileError(TLCouplingError):
    """A result file is damaged, foreign or of an unknown version."""


class PlanError(TLCouplingError, ValueError):
    """The plan of a sweep is invalid. The message names the file, the key and the allowed values."""


class StoreError(TLCouplingError):
    """A store of sweep results cannot be read, written or merged."""
