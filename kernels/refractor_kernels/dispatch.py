"""One dispatch for all operations: which implementation runs on these tensors, and why.

An operation's family file declares ``Op(name, reference)``; faster implementations register beside it with a function that says
why they do not support given arguments, or ``None`` where they do. The first supporting one, in order of registration with the
latest first, is what ``auto`` runs; the reference always supports. An op that lacks a named backend does what ``auto`` would, so that one
name can be given for all ops of a model. On the meta device, where a dry run counts bytes, ``auto`` runs the op's fake if it has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMES = ("torch", "triton", "flash_attn", "cudnn", "apex")
"""Backends that exist anywhere; an op has some of them."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Args:
        name: one of ``NAMES``.
        run: the implementation; same arguments as the reference.
        refusal: same arguments; why they are not supported, or ``None``.
    """

    name: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None]


class Op:
    """An operation and its implementations, best first. The reference is the last and refuses nothing.

    Attributes:
        prefer: same arguments as the reference; (names in the order that ``auto`` tries first, where that is from), for an op whose best
            implementation depends on architecture and shape. None: the order of registration.
    """

    registry: dict[str, "Op"] = {}

    def __init__(self, name: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None):
        """``fake`` has the reference's arguments and holds what the best kernel holds; None: the reference holds no more than that."""
        self.name, self.fake = name, fake
        self.backends = [Backend("torch", reference, lambda *tensors, **options: None)]
        self.prefer: Callable[..., tuple[list[str], str]] | None = None
        Op.registry[name] = self

    def register(self, name: str, run: Callable[..., Any], refusal: Callable[..., str | None]) -> None:
        """Puts an implementation before the ones registered so far."""
        assert name in NAMES, name
        self.backends.insert(0, Backend(name, run, refusal))

    def _named(self, name: str) -> Backend | None:
        """The implementation of that name; None for ``auto`` and for names that this op lacks.

        Raises:
            ValueError: no backend anywhere has the name.
        """
        if name not in ("auto", *NAMES):
            raise ValueError(f"{self.name}: backend={name!r} is not one of {', '.join(('auto', *NAMES))}")
        return next((backend for backend in self.backends if backend.name == name), None)

    def choose(self, backend: str, tensors: tuple, options: dict) -> tuple[Backend, str]:
        """The implementation to run and the reason.

        Raises:
            ValueError: an unknown backend, or one that does not support the arguments.
        """
        named = self._named(backend)
        if named is not None:
            reason = named.refusal(*tensors, **options)
            if reason is not None:
                raise ValueError(f"{self.name}: backend={backend!r} does not support these arguments: {reason}")
            return named, "asked for"
        told = [] if backend == "auto" else [f"there is no {backend}"]
        candidates, source = self.backends, ""
        if self.prefer is not None:
            names, source = self.prefer(*tensors, **options)
            candidates = sorted(self.backends, key=lambda backend: names.index(backend.name) if backend.name in names else len(names))
        for candidate in candidates:
            reason = candidate.refusal(*tensors, **options)
            if reason is None:
                break
            told.append(f"not {candidate.name}: {reason}")
        alone = "the only backend" if len(self.backends) == 1 else "the fastest that supports these arguments"
        return candidate, "; ".join([*told, *([f"order: {source}"] if source else [])]) or alone

    def __call__(self, backend: str, *tensors: Any, **options: Any) -> Any:
        if self._named(backend) is None:
            if self.fake is not None and tensors[0].device.type == "meta":
                return self.fake(*tensors, **options)
            if len(self.backends) == 1:
                return self.backends[0].run(*tensors, **options)
        return self.choose(backend, tensors, options)[0].run(*tensors, **options)


def _op(name: str) -> Op:
    if name not in Op.registry:
        raise ValueError(f"op={name!r} is not one of {', '.join(sorted(Op.registry))}")
    return Op.registry[name]


def backends(op: str) -> list[str]:
    """Names of the op's implementations, best first.

    Raises:
        ValueError: an unknown op.
    """
    return [backend.name for backend in _op(op).backends]


def explain(op: str, *tensors: Any, backend: str = "auto", **options: Any) -> str:
    """Which backend runs ``op`` on these arguments, and why.

    Args:
        op: name of a public function of this package.
        tensors: its positional arguments.
        backend, options: its keyword arguments.

    Raises:
        ValueError: an unknown op or backend, or one that does not support the arguments.
    """
    chosen, why = _op(op).choose(backend, tensors, options)
    return f"{op}: {chosen.name} ({why})"
