"""Final latents of any sampling loop, also of one that does not hand them out.

Most pipelines return their final latents for ``output_type="latent"``. Others know no such argument or refuse it, or
return images, arrays or lists. For these the sample counts that the scheduler made in its last step: what the loop
holds as it ends, before a decoder makes images of it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import Tensor

from ecodiff.errors import EcoDiffError

# What a pipeline's own code raises for arguments that it does not take, or for a fault in its middle.
FAULTS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    NameError,
    AssertionError,
)


@dataclass
class Watch:
    """What a running loop has done: scheduler steps, and the sample that each scheduler made last.

    A loop may copy its scheduler, for a second modality or for each frame: ``last`` has one entry for each that
    stepped, in the order of their first steps.
    """

    last: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    cut: bool = False
    """Whether a scheduler was given a prediction with gradients and returned a sample without."""

    @property
    def steps(self) -> int:
        """Steps of the scheduler that has made most."""
        return max(self.counts.values(), default=0)

    def reset(self) -> None:
        """Begin a new trajectory."""
        self.last.clear()
        self.counts.clear()


def count_steps(scheduler, each: Callable[[Tensor, float], None] | None = None) -> Watch:
    """Make this (private) scheduler, and the copies that a loop makes of it, note their steps in the result.

    each: gets the prediction and the time of each step.

    The scheduler gets a class of its own: a function set on the instance would go along into copies and step the
    original.
    """
    watch = Watch()
    cls = type(scheduler)
    own = vars(scheduler).pop("step", None)

    @wraps(own or cls.step)  # pipelines look at the signature to see whether it takes eta and a generator
    def step(self, *args, **kwargs):
        result = own(*args, **kwargs) if own else cls.step(self, *args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if isinstance(sample, Tensor):
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            watch.cut |= any(value.requires_grad for value in given) and not sample.requires_grad
            watch.last[id(self)] = sample
        watch.counts[id(self)] = watch.counts.get(id(self), 0) + 1
        if each is not None:
            told = inspect.signature(cls.step).bind(self, *args, **kwargs).arguments
            each(told["model_output"], float(told["timestep"]))
        return result

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})
    return watch


class _Over(Exception):
    """Ends a call of a pipeline as its sampling loop is over."""


class _Bar:
    """A pipeline's progress bar that calls ``over`` as the loop below it ends without an error."""

    def __init__(self, bar, over: Callable[[], None]):
        self._bar, self._over = bar, over

    def __enter__(self):
        self._bar.__enter__()
        return self

    def __exit__(self, kind, *rest):
        self._bar.__exit__(kind, *rest)
        if kind is None:
            self._over()

    def __iter__(self):
        yield from self._bar
        self._over()

    def __getattr__(self, name: str):
        return getattr(self._bar, name)


def last_latents(runner, watch: Watch, call: Callable, arguments: Mapping) -> Tensor:
    """The final latents of one call of a pipeline, a tensor whose first dimension is the samples.

    Args:
        runner: the pipeline, a private copy with the scheduler that ``watch`` is of.
        watch: what `count_steps` returned for it.
        call: the call to make, a function of the pipeline and its arguments.
        arguments: of that call, without ``output_type`` and ``return_dict``.

    Where a loop steps several schedulers, such as one for a video and one for its sound, the latents of each sample are
    all of them, as one vector. Raises EcoDiffError where the call fails or no scheduler of the loop is known.
    """
    watch.reset()
    known = inspect.signature(call).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    ours: dict = {"return_dict": False} if "return_dict" in known or any_name else {}
    hands_out = hands_out_latents(call)
    if hands_out:
        ours["output_type"] = "latent"
    elif "output_type" in known and _knows(call, "pt"):
        ours["output_type"] = "pt"  # nothing is decoded: the loop is left before
    left = []

    def over() -> None:
        if watch.last:
            left.append(True)
            if not hands_out:
                raise _Over

    bar_of = getattr(runner, "progress_bar", None)
    if bar_of is not None:
        runner.__dict__["progress_bar"] = lambda *args, **kwargs: _Bar(bar_of(*args, **kwargs), over)
    try:
        result = call(runner, **ours, **arguments)
    except _Over:
        result = None
    except (EcoDiffError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        if not left:
            raise failed(runner, error) from error
        result = None  # what came after the loop is not needed
    finally:
        if bar_of is not None:
            del runner.__dict__["progress_bar"]
    latents = _latents_in(result, len(watch.last))
    if latents is None:
        latents = next(iter(watch.last.values()), None)
    if latents is None:
        raise EcoDiffError(
            f"{type(runner).__name__} with {type(runner.scheduler).__name__} returned {_kind(result)}, not a tensor of "
            "latents, and its loop calls no step of its scheduler: score its units without gradients (magnitude)."
        )
    return latents


def failed(pipe, error: BaseException) -> EcoDiffError:
    """The error for a pipeline whose own call failed, with the last words of its own."""
    missing = missing_name(error)
    if missing:
        return EcoDiffError(f"{type(pipe).__name__} needs {missing}.")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return EcoDiffError(
        f"The call of {type(pipe).__name__} fails with these prompts and arguments ({type(error).__name__}: "
        f"{lines[0][:300]}): give what one call of it needs, in each prompt (a mapping of arguments) or in `call`."
    )


def missing_name(error: BaseException) -> str | None:
    """What is not there, in words, where a call failed because diffusers imports it only if a library is installed."""
    if isinstance(error, (NameError, ModuleNotFoundError)) and error.name:
        if importlib.util.find_spec(error.name.partition(".")[0]) is None:
            return f"{error.name}, which is not there: install the library that it comes from"
    return None


def _latents_in(result, modalities: int) -> Tensor | None:
    """The latents among what a call returned; None where its first part is no tensor."""
    if result is None or isinstance(result, Tensor):  # some pipelines return bare frames
        return result
    try:
        parts = [result[number] for number in range(len(result))]
    except (KeyError, TypeError):
        return None
    if not parts or not isinstance(parts[0], Tensor):
        return None
    together = [part for part in parts[:modalities] if isinstance(part, Tensor) and len(part) == len(parts[0])]
    if len(together) < 2:
        return parts[0]
    return torch.cat([part.flatten(1) for part in together], 1)


def hands_out_latents(call: Callable) -> bool:
    """Whether a pipeline's call returns latents for ``output_type="latent"``, as far as its code says."""
    known = inspect.signature(call).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return True
    return "output_type" in known and _knows(call, "latent")


def _knows(call: Callable, output_type: str) -> bool:
    """Whether the class of a call has a word for this type of output; true where there is no code to read."""
    owner = getattr(inspect.getmodule(call), call.__qualname__.partition(".")[0], call)
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return True
    return f'"{output_type}"' in source or f"'{output_type}'" in source


def _kind(result) -> str:
    if isinstance(result, (tuple, list)) and result:
        return type(result[0]).__name__
    return type(result).__name__
