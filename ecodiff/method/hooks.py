"""Gates in a running denoiser (Eq. 7-10): each multiplies the input of the layer that reads its units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import hooked, never_ran
from ecodiff.pipelines.parts import Experts, experts

from .layers import channel_axis
from .sites import KINDS, Site, check_units, find_sites


@contextmanager
def apply_gates(
    denoiser: nn.Module,
    values: Mapping[str, Tensor] | Callable[[str], Tensor],
    sites: Mapping[str, Site] | None = None,
    learned: Iterable[Tensor] = (),
    must_run: bool = True,
) -> Iterator[None]:
    """While the context is open every forward of the denoiser is multiplied by these gates (Eq. 9, 10); hooks only.

    Args:
        denoiser: the network; its weights do not change.
        values: {site name: tensor [units]}, float or bool; or tensors [samples, units], the gates of each sample of the
            batch, which guidance may repeat as a whole; or a function of the site's name that is asked once for each
            call of the site's module (a fresh sample a call, as the original code does).
        sites: the sites to gate when `values` is a function, all attentions and feed-forwards by default.
        learned: when `values` is a function: the tensors it makes gates from (λ). Time-step checkpointing returns
            gradients to these, and refuses to run on to a wrong gradient where they are left out.
        must_run: False allows gated layers that never run while the context is open.

    A gate multiplies the input of the layers that read its units, in the activations' dtype; joint attention's image
    and text outputs read the same heads and share their gates. The hooks are removed on exit, also after an error.
    A compiled denoiser runs eagerly inside, since compiled code does not see hooks.

    Raises EcoDiffError for gates that do not fit the sites, and on leaving for a gated layer that never ran, whose gate
    had no effect: leave its site out of ``values`` (or ``sites``) where that is meant.
    """
    # Hooks look their gate up in `current` whenever they run. So gates can be exchanged while the context is open: by
    # each call of a site's module where they are drawn, and by checkpointing for a call that runs again.
    current: dict[str, Tensor]
    drawn_from: tuple[Tensor, ...] | None
    if callable(values):
        if sites is None:
            sites = find_sites(denoiser)
        chosen, current, drawn_from = dict(sites), {}, tuple(learned)
    else:
        if sites is None:
            sites = find_sites(denoiser, KINDS)
        check_units(values, sites, "apply_gates", samples=True)
        chosen, current, drawn_from = {name: sites[name] for name in values}, dict(values), None

    opened = (current, drawn_from)
    _OPEN.setdefault(denoiser, []).append(opened)
    try:
        with hooked(denoiser, "apply_gates", must_run) as hooks:
            for name, site in chosen.items():
                if callable(values):
                    hooks.before(name, _draw_hook(values, name, current), site=name)
                for span in site.gated:
                    axis = channel_axis(denoiser.get_submodule(span.layer))
                    if site.readers:
                        hooks.before(span.layer, _input_hook(current, name, span, axis), site=name)
                    else:
                        hooks.after(span.layer, _output_hook(current, name, span), site=name)
            yield
    finally:
        # By identity: equal dictionaries of tensors cannot be compared, and contexts may close in any order.
        _OPEN[denoiser] = [entry for entry in _OPEN[denoiser] if entry is not opened]


# For each denoiser the gates that are open on it: what its hooks multiply by, and what drawn gates are made from (None
# where gates are not drawn but given). Like its hooks this is state of the denoiser. It cannot be an attribute, since
# the `Experts` of a pipeline are made anew at each look; they are equal where their networks are the same.
_OPEN: WeakKeyDictionary = WeakKeyDictionary()


class OpenGates:
    """The gates open on a denoiser as inputs of one of its calls, so that a call can be run again with others.

    ``values`` are the gates given to `apply_gates` that require gradients, ``learned`` what drawn gates are made from.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.checked = denoiser, False
        self.values: list[Tensor] = []
        self.learned: list[Tensor] = []
        self._places: list[tuple[dict[str, Tensor], str]] = []  # where each of the values is looked up
        owners = [denoiser]
        if isinstance(denoiser, Experts):  # gates may be open on all experts of a pipeline, or on one of them alone
            owners += experts(denoiser)
        for owner in owners:
            for current, drawn_from in _OPEN.get(owner, ()):
                if drawn_from is None:
                    self._add_given(current)
                else:
                    self.learned += [tensor for tensor in drawn_from if tensor.requires_grad]

    def _add_given(self, current: dict[str, Tensor]) -> None:
        for name, value in current.items():
            if value.requires_grad:
                self._places.append((current, name))
                self.values.append(value)

    @contextmanager
    def replaced(self, values: Iterable[Tensor]) -> Iterator[None]:
        """Inside, hooks multiply by these in the place of ``values``, one each."""
        before = [current[name] for current, name in self._places]
        for (current, name), value in zip(self._places, values, strict=True):
            current[name] = value
        try:
            yield
        finally:
            for (current, name), value in zip(self._places, before, strict=True):
                current[name] = value


def _draw_hook(draw, name, current):
    """Draws the gates of a site as its module is called, before any layer in it runs."""

    def hook(x):
        current[name] = draw(name)

    return hook


def _input_hook(current, name, span, axis):
    def hook(x):
        if name not in current:  # gates are drawn as the site's module is called
            raise never_ran("apply_gates", [name], 1, name)
        return _multiply(x.movedim(axis, -1), current[name], span).movedim(-1, axis)

    return hook


def _output_hook(current, name, span):
    def hook(args, kwargs, output):
        return _multiply(output, current[name], span)

    return hook


def _multiply(x: Tensor, gate: Tensor, span) -> Tensor:
    """x [..., channels] with the channels of each unit multiplied by its gate [units]; other channels stay as they are.

    With gates [samples, units] the batch of x holds these samples in this order, once or, with guidance, repeated as a
    whole. Raises EcoDiffError for a batch that cannot be these samples.
    """
    channels = gate.to(x.device, torch.float32).repeat_interleave(span.size, dim=-1)
    # Channels of other units (the heads beside the neurons in FLUX's proj_out) are multiplied by one.
    rest = x.shape[-1] - span.offset - channels.shape[-1]
    channels = nn.functional.pad(channels, (span.offset, rest), value=1.0).to(x.dtype)
    if gate.dim() == 1:
        return x * channels
    batch = x.shape[0]
    if batch % len(gate):
        raise EcoDiffError(
            f"{len(gate)} samples have gates of their own, but {span.layer} was called with a batch of {batch}: "
            "this pipeline splits its batch otherwise; learn with micro_batch_size=1."
        )
    between = [1] * (x.dim() - 2)  # tokens, or height and width
    return x * channels.repeat(batch // len(gate), 1).view(batch, *between, -1)
