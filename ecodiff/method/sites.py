"""Where units can be removed from a denoiser (Eq. 7-10, Fig. 3): the only code that knows about architectures.

A *site* is one module whose hidden units can go one by one without changing the width of anything outside it:

    kind           unit                 written by                     read by
    attention      one head             to_q, to_k, to_v, add_*_proj   to_out.0 and to_add_out, or the block's proj_out
    feed_forward   one hidden neuron    net.0.proj (GEGLU: 2 rows)     net.2, or the block's proj_out
    modulation     one output channel   the adaLN linear               nothing: a missing channel is zero

Sites are recognised by the shapes of their layers, never by the name of a model. `skipped_modules` says what looked
like a site and is not one, and why.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import hooked
from ecodiff.pipelines.parts import plain_name

from .config import KINDS

_INPUT_LAYERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_QUERY_LAYERS = ("to_q", "add_q_proj")
_KEY_LAYERS = ("to_k", "add_k_proj")
_HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
# Parts of an attention module that act on its input or inside one head, so that removing other heads changes nothing.
_ATTENTION_PARTS = {*_INPUT_LAYERS, *_HEAD_NORMS, "to_out", "to_add_out", "group_norm", "spatial_norm", "norm_cross"}


@dataclass(frozen=True)
class Span:
    """Rows or columns of a linear layer that belong to units: unit i has `size` of them from `offset + i * size` on."""

    layer: str
    offset: int
    size: int


@dataclass(frozen=True)
class Site:
    """One module with removable units.

    `writers` are rows of the layers that make the units, `readers` columns of the layers that use them. A gate
    multiplies the input of the readers (after the heads, Eq. 9; after the activation, Eq. 10); a site without readers
    is gated where it is written. `unit_size` is the number of channels of one unit there. `params_per_unit` counts
    every weight and bias that goes with one unit; `flops_per_unit` is None until `with_flops` has measured it.
    """

    name: str
    kind: str
    units: int
    unit_size: int
    writers: tuple[Span, ...]
    readers: tuple[Span, ...]
    params_per_unit: int
    flops_per_unit: int | None = None

    @property
    def gated(self) -> tuple[Span, ...]:
        """The spans a gate multiplies: the readers' input, or the writers' output where there is no reader."""
        return self.readers or self.writers


class _NotASite(Exception):
    """Looks like a site, but removing one unit would change the others; the text says why."""


def find_sites(denoiser: nn.Module, kinds: tuple[str, ...] = ("attention", "feed_forward")) -> dict[str, Site]:
    """Return `{module name: Site}` in the order of `denoiser.named_modules()`.

    Raises EcoDiffError for an unknown kind.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise EcoDiffError(f"find_sites: unknown kind {sorted(unknown)[0]!r}; the kinds are {', '.join(KINDS)}.")
    return {site.name: site for site in _walk(denoiser) if isinstance(site, Site) and site.kind in kinds}


def sites_but(denoiser: nn.Module, kinds: tuple[str, ...], exclude: Collection[str]) -> dict[str, Site]:
    """`find_sites` without the sites of these names; raises EcoDiffError for a name that is no site of any kind."""
    if exclude:
        known = find_sites(denoiser, KINDS)
        for name in exclude:
            if name not in known:
                raise EcoDiffError(f"exclude: {name!r} is not a site of this denoiser; find_sites lists them.")
    return {name: site for name, site in find_sites(denoiser, kinds).items() if name not in exclude}


def network_order(name: str) -> tuple:
    """Sort key of site names: from the network's input to its output, where diffusers names the middle block last."""
    parts = name.split(".")
    place = {"mid_block": 1, "single_transformer_blocks": 1, "up_blocks": 2}.get(parts[0], 0)
    numbers = [int(part) for part in parts if part.isdigit()]
    return place, numbers, parts[-1]


def skipped_modules(denoiser: nn.Module) -> dict[str, str]:
    """Return `{module name: reason}` for attentions and feed-forwards in which no unit can be removed exactly."""
    return dict(entry for entry in _walk(denoiser) if not isinstance(entry, Site))


def with_flops(denoiser: nn.Module, sites: Mapping[str, Site], run: Callable[[], Any]) -> dict[str, Site]:
    """Return the sites with `flops_per_unit` measured while `run()` calls the denoiser once (on any device).

    Counted are 2 operations per multiply-add of the unit's linear layers and, for a head, of its two attention
    products, over the batch and tokens that `run` uses. A compiled denoiser runs eagerly here.

    Raises EcoDiffError where `run` does not reach a layer of a site: leave such sites out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {span.layer: name for name, site in sites.items() for span in site.writers + site.readers}

    def noting(layer):
        def note(x):
            shapes[layer] = tuple(x.shape)

        return note

    with hooked(denoiser, "with_flops") as hooks:
        for layer, site in layers.items():
            hooks.before(layer, noting(layer), site)
        run()

    return {name: replace(site, flops_per_unit=_flops(denoiser, site, shapes)) for name, site in sites.items()}


def _flops(denoiser: nn.Module, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Operations of one unit; ``shapes``: {layer name: shape of its input}."""

    def rows(span: Span) -> int:
        return math.prod(shapes[span.layer][:-1])

    total = 0
    for span in site.writers:
        total += 2 * rows(span) * span.size * denoiser.get_submodule(span.layer).in_features
    for span in site.readers:
        total += 2 * rows(span) * span.size * denoiser.get_submodule(span.layer).out_features
    if site.kind == "attention":
        # Two products, of queries with keys and of their weights with values, over the tokens of all streams together.
        batch = shapes[site.writers[0].layer][0]
        queries = keys = 0
        for span in site.writers:
            tokens = shapes[span.layer][-2]
            layer = span.layer.rpartition(".")[2]
            if layer in _QUERY_LAYERS:
                queries += tokens
            elif layer in _KEY_LAYERS:
                keys += tokens
        total += 4 * batch * queries * keys * site.unit_size
    return total


def _walk(denoiser: nn.Module) -> Iterator[Site | tuple[str, str]]:
    """Yield every site, and (name, reason) for every look-alike."""
    modules = {plain_name(name): module for name, module in denoiser.named_modules()}
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0], denoiser)
        try:
            # The attention of a parallel block (FLUX) has pre_only in the place of an output layer of its own.
            if hasattr(module, "to_q") and (hasattr(module, "to_out") or hasattr(module, "pre_only")):
                yield _attention(name, module, parent)
            elif isinstance(getattr(module, "net", None), nn.ModuleList):
                yield _feed_forward(name, module)
            elif name.rpartition(".")[2] == "proj_mlp":
                yield _parallel_mlp(name, module, parent)
            elif {"silu", "linear", "norm"} <= {child for child, _ in module.named_children()}:
                # A shift, a scale and a gate at least. Norms with two of them (AdaLayerNormContinuous) are no sites.
                if module.linear.out_features >= 3 * module.linear.in_features:
                    yield _modulation(name, module)
            elif type(module).__name__.endswith(("FeedForward", "GLUMBConv")):
                raise _NotASite("not built like diffusers' FeedForward (net.0.proj, net.2)")
        except _NotASite as reason:
            yield name, str(reason)


def _attention(name: str, module: nn.Module, parent: nn.Module) -> Site:
    if getattr(module, "fused_projections", False):
        raise _NotASite("its projections are fused; call unfuse_qkv_projections() first")
    for child, part in module.named_children():
        if child not in _ATTENTION_PARTS and next(part.parameters(), None) is not None:
            raise _NotASite(f"unknown part {child!r}")
    inputs = {}
    for layer in _INPUT_LAYERS:
        part = getattr(module, layer, None)
        if part is not None:
            inputs[layer] = part
    _check_linear(*inputs.values())
    heads, width = module.heads, inputs["to_q"].out_features
    if heads < 1 or width % heads:
        raise _NotASite(f"{width} query channels do not divide into {heads} heads")
    head_dim = width // heads
    # With fewer key heads than query heads a unit is one key head and all the query heads that share it.
    units, rest = divmod(min(part.out_features for part in inputs.values()), head_dim)
    if rest or heads % units:
        raise _NotASite("its key heads do not divide its query heads")
    for norm in _HEAD_NORMS:
        size = _norm_size(getattr(module, norm, None))
        if size not in (None, head_dim):
            raise _NotASite(f"{norm} normalises {size} channels across heads of {head_dim}")

    sizes = {layer: part.out_features // units for layer, part in inputs.items()}
    if any(sizes[layer] != width // units for layer in inputs if layer in _QUERY_LAYERS):
        raise _NotASite("its two streams have different widths")
    writers = tuple(Span(f"{name}.{layer}", 0, size) for layer, size in sizes.items())

    outputs = _attention_outputs(name, module, parent, width)
    readers = tuple(Span(layer, 0, width // units) for layer in outputs)
    layers = {f"{name}.{layer}": part for layer, part in inputs.items()} | outputs
    return _site(name, "attention", units, writers, readers, layers)


def _attention_outputs(name: str, module: nn.Module, parent: nn.Module, width: int) -> dict[str, nn.Linear]:
    """{layer name: layer} of the layers that read the heads, ``width`` channels together."""
    to_out = getattr(module, "to_out", None)
    if to_out is None and isinstance(getattr(parent, "proj_out", None), nn.Module):
        return {_beside(name, "proj_out"): _parallel_reader(parent, module)}
    if not isinstance(to_out, nn.ModuleList):
        raise _NotASite("its output layer is not to_out[0]")
    outputs = {f"{name}.to_out.0": to_out[0]}
    if getattr(module, "to_add_out", None) is not None:  # joint attention: the text stream has a layer of its own
        outputs[f"{name}.to_add_out"] = module.to_add_out
    _check_linear(*outputs.values())
    if any(layer.in_features != width for layer in outputs.values()):
        raise _NotASite("its output layer does not read the heads one by one")
    return outputs


def _feed_forward(name: str, module: nn.Module) -> Site:
    net = module.net
    proj = getattr(net[0], "proj", None) if len(net) > 2 else None
    if proj is None or not isinstance(net[1], nn.Dropout):
        raise _NotASite("not built like diffusers' FeedForward (net.0.proj, dropout, net.2)")
    _check_linear(proj, net[2])
    units = net[2].in_features
    if units == 0:
        raise _NotASite("no unit is left")
    if proj.out_features not in (units, 2 * units):
        raise _NotASite(f"{proj.out_features} rows in, {units} columns out")
    # A gated activation (GEGLU, SwiGLU) splits its rows into value and gate: neuron i owns row i of both halves.
    writers = tuple(Span(f"{name}.net.0.proj", offset, 1) for offset in range(0, proj.out_features, units))
    readers = (Span(f"{name}.net.2", 0, 1),)
    return _site(name, "feed_forward", units, writers, readers, {writers[0].layer: proj, readers[0].layer: net[2]})


def _parallel_mlp(name: str, module: nn.Module, parent: nn.Module) -> Site:
    """FLUX's single block: proj_out reads the heads first, then the neurons of proj_mlp."""
    attention = getattr(parent, "attn", None)
    if attention is None or not isinstance(getattr(parent, "proj_out", None), nn.Module):
        raise _NotASite("no attn and proj_out beside it")
    _check_linear(module)
    proj_out = _parallel_reader(parent, attention)
    layer = _beside(name, "proj_out")
    offset = proj_out.in_features - module.out_features
    if module.out_features == 0:
        raise _NotASite("no unit is left")
    writers, readers = (Span(name, 0, 1),), (Span(layer, offset, 1),)
    return _site(name, "feed_forward", module.out_features, writers, readers, {name: module, layer: proj_out})


def _parallel_reader(parent: nn.Module, attention: nn.Module) -> nn.Linear:
    """The layer of a parallel block that reads [heads, neurons], checked to be as wide as both together."""
    _check_linear(parent.proj_out)
    heads = attention.to_q.out_features if hasattr(attention, "to_q") else 0
    neurons = getattr(getattr(parent, "proj_mlp", None), "out_features", None)
    if neurons is None or parent.proj_out.in_features != heads + neurons:
        raise _NotASite("proj_out does not read the heads and the neurons of proj_mlp side by side")
    return parent.proj_out


def _modulation(name: str, module: nn.Module) -> Site:
    if type(module.linear) is not nn.Linear:
        raise _NotASite("its channels are already pruned, or the layer is wrapped or quantised")
    writers = (Span(f"{name}.linear", 0, 1),)
    return _site(name, "modulation", module.linear.out_features, writers, (), {writers[0].layer: module.linear})


def _site(name, kind, units, writers, readers, layers: Mapping[str, nn.Linear]) -> Site:
    """The site with the parameters of one unit counted: its rows in the writers with their biases, and its columns."""
    params = 0
    for span in writers:
        layer = layers[span.layer]
        params += span.size * (layer.in_features + (layer.bias is not None))
    for span in readers:
        params += span.size * layers[span.layer].out_features
    unit_size = (readers or writers)[0].size
    return Site(name, kind, units, unit_size, writers, readers, params)


def _beside(name: str, sibling: str) -> str:
    """The name of the module ``sibling`` in the module that holds ``name``."""
    return f"{name.rpartition('.')[0]}.{sibling}".lstrip(".")


def _check_linear(*layers: nn.Module) -> None:
    """Raise _NotASite for layers whose rows and columns cannot be cut out of their weights."""
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise _NotASite(f"{type(layer).__name__} instead of Linear (fuse and unload adapters before pruning)")
        if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            raise _NotASite("its weights are packed (quantised); prune before quantising")


def _norm_size(norm: nn.Module | None) -> int | None:
    """Number of channels that a query or key norm normalises together, None where it does not say."""
    if norm is None:
        return None
    size = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if isinstance(size, int):
        return size if size > 0 else None  # LpNorm's dim is an axis
    if size is not None:
        return size[-1]
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.numel()


def check_units(values: Mapping[str, Tensor], sites: Mapping[str, Site], where: str, samples: bool = False) -> None:
    """Raise EcoDiffError, beginning with ``where``, for a name that is no site or a number of units that is wrong.

    ``samples``: tensors [samples, units] are right, too.
    """
    for name, value in values.items():
        if name not in sites:
            raise EcoDiffError(f"{where}: {name!r} is not a site of this denoiser; find_sites lists them.")
        right_form = value.dim() == 1 or (samples and value.dim() == 2 and len(value))
        if not right_form or value.shape[-1] != sites[name].units:
            raise EcoDiffError(f"{where}: {name!r} has {sites[name].units} units, not {list(value.shape)}.")
