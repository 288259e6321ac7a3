"""Where units can be removed from a denoiser (Eq. 7-10, Fig. 3): the only code that knows about architectures.

A *site* is one module whose hidden units can go one by one without changing the width of anything outside it:

    kind           unit                 written by                     read by
    attention      one head             to_q, to_k, to_v, add_*_proj   to_out.0 and to_add_out, or the block's proj_out
    feed_forward   one hidden neuron    net.0.proj (GEGLU: 2 rows)     net.2, or the block's proj_out
    modulation     one output channel   the adaLN linear               nothing: a missing channel is zero

Further forms: projections that write queries, keys and values (FLUX.2: neurons, too) one after the other, output gates
of heads, norms over all heads (Wan, LTX), and feed-forwards whose layers have other names or are convolutions
(`ecodiff.method.roles`), or stand in the block itself.

Sites are recognised by the shapes of their layers, never by the name of a model. `skipped_modules` says what looked
like a site and is not one, and why. Whether units can really go is tried on real
calls (`ecodiff.method.trial`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import hooked
from ecodiff.pipelines.parts import plain_name

from .config import KINDS
from .emptied import OUTPUT_LAYERS, form_of, is_emptied
from .layers import channel_axis, columns_of
from .roles import Roles, feed_forward_roles, has_sizes_of_feed_forward, rows_of_unit

# Layers that write the queries, keys and values of heads, by the names that attentions of diffusers give them. A fused
# one writes several of them, one after the other.
_QUERY_LAYERS = ("to_q", "to_query", "add_q_proj")
_KEY_LAYERS = ("to_k", "to_key", "add_k_proj")
_VALUE_LAYERS = ("to_v", "to_value", "add_v_proj")
_INPUT_LAYERS = (*_QUERY_LAYERS, *_KEY_LAYERS, *_VALUE_LAYERS)
_FUSED_LAYERS = ("to_qkv", "to_kv", "qkv", "img_qkv_proj", "txt_kv_proj", "img_attn_qkv", "txt_attn_qkv")
_FUSED_WITH_NEURONS = "to_qkv_mlp_proj"
_QUERIES_OF_FUSED = ("to_qkv", "qkv", "img_qkv_proj", "img_attn_qkv", "txt_attn_qkv", _FUSED_WITH_NEURONS)
_QUERY_NORMS = ("norm_q", "norm_added_q", "query_norm", "q_norm", "img_attn_q_norm", "txt_attn_q_norm")
_KEY_NORMS = ("norm_k", "norm_added_k", "key_norm", "k_norm", "img_attn_k_norm", "txt_attn_k_norm")
_HEAD_NORMS = (*_QUERY_NORMS, *_KEY_NORMS)
# An output gate multiplies what the heads return, with one number or one a channel for each head.
_OUTPUT_GATES = ("to_gate", "to_gate_logits", "gate_proj", "g_proj")
# Parts of an attention module that act on its input or inside one head, so that removing other heads changes nothing.
_ATTENTION_PARTS = {
    *_INPUT_LAYERS,
    *_FUSED_LAYERS,
    _FUSED_WITH_NEURONS,
    *OUTPUT_LAYERS,
    *_HEAD_NORMS,
    *_OUTPUT_GATES,
    "group_norm",
    "spatial_norm",
    "norm_cross",
}
# By which names an attention says how many heads it has; processors reshape by these numbers.
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")
KEY_HEADS = ("num_kv_heads", "kv_heads", "n_kv_heads", "num_key_value_heads")


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

    `selects` are norms over all heads of queries or keys. They must see all channels, so their projections stay whole,
    and only what they return is selected. `min_units`: units that have to stay, since it is not known what the module
    without units would return.
    """

    name: str
    kind: str
    units: int
    unit_size: int
    writers: tuple[Span, ...]
    readers: tuple[Span, ...]
    params_per_unit: int
    flops_per_unit: int | None = None
    selects: tuple[Span, ...] = ()
    min_units: int = 0

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
    """Return `{module name: reason}` for what is like an attention or a feed-forward and has no units that can go.

    Queries and keys that stay whole beside values that do not are named, too. Those with most parameters come first.
    """
    entries = list(_walk(denoiser))
    sites = [entry.name for entry in entries if isinstance(entry, Site)]
    reasons = dict(entry for entry in entries if not isinstance(entry, Site))
    known = (*sites, *reasons)
    for name, module in denoiser.named_modules():
        name = plain_name(name)
        # Neither a part of what is known, nor what holds it.
        if any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in known):
            continue
        reason = _why_like_a_site(name, module)
        if reason is not None:
            reasons[name] = reason
            known = (*known, name)

    def parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in denoiser.get_submodule(name).parameters())

    return dict(sorted(reasons.items(), key=lambda entry: -parameters(entry[0])))


# What modules are called that attend, or that write hidden units and read them.
_LIKE_AN_ATTENTION = re.compile("Attention|Attn")
_LIKE_A_FEED_FORWARD = re.compile("FeedForward|MLP|Mlp|FFN|GLU|MoE|Expert")


def _why_like_a_site(name: str, module: nn.Module) -> str | None:
    """Why a module that is like an attention or a feed-forward has no units; None for one that is like neither."""
    kind = type(module).__name__
    # Embedders and norms have pairs of layers, too; what these write steers the whole network.
    if name == "" or next(module.parameters(), None) is None or "Embed" in kind or "Norm" in kind:
        return None
    lists = (nn.ModuleList, nn.ModuleDict)
    has_layers = any(isinstance(part, nn.Linear) for part in module.children())
    if isinstance(module, lists) or (any(isinstance(part, lists) for part in module.children()) and not has_layers):
        return None  # a block of others, which are looked at one by one
    if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
        if _LIKE_A_FEED_FORWARD.search(kind):
            return "the weights of its experts are packed in one tensor"
    if _LIKE_AN_ATTENTION.search(kind):
        return "its layers have other names or forms than those of attentions that are known here"
    if _LIKE_A_FEED_FORWARD.search(kind) or (_may_be_feed_forward(name, module) and has_sizes_of_feed_forward(module)):
        return "no layer of it writes units that another one reads one by one"
    return None


def share_reached(denoiser: nn.Module, sites: Mapping[str, Site]) -> float:
    """The share of the denoiser's parameters that goes with the units of these sites."""
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    return sum(site.units * site.params_per_unit for site in sites.values()) / max(total, 1)


def with_flops(denoiser: nn.Module, sites: Mapping[str, Site], run: Callable[[], Any]) -> dict[str, Site]:
    """Return the sites with `flops_per_unit` measured while `run()` calls the denoiser once (on any device).

    Counted are 2 operations per multiply-add of the unit's linear layers and, for a head, of its two attention
    products, over the batch and tokens that `run` uses. A compiled denoiser runs eagerly here.

    Raises EcoDiffError where `run` does not reach a layer of a site: leave such sites out.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {}
    for name, site in sites.items():
        for span in site.writers + site.readers + site.selects:
            layers[span.layer] = name

    def noting(layer):
        def note(x):
            shapes[layer] = tuple(x.shape)

        return note

    with hooked(denoiser, "with_flops") as hooks:
        for layer, owner in layers.items():
            hooks.before(layer, noting(layer), owner)
        run()

    return {name: replace(site, flops_per_unit=_flops(denoiser, site, shapes)) for name, site in sites.items()}


def _flops(denoiser: nn.Module, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Operations of one unit; ``shapes``: {layer name: shape of its input}."""

    total = 0
    for dimension, spans in enumerate((site.writers, site.readers)):
        for span in spans:
            layer = denoiser.get_submodule(span.layer)
            shape = shapes[span.layer]
            places = math.prod(shape) // shape[channel_axis(layer)]
            weights = layer.weight.select(dimension, 0).numel()
            total += 2 * places * span.size * weights
    if site.kind == "attention":
        # Two products, of queries with keys and of their weights with values, over the tokens of all streams together.
        batch = shapes[site.writers[0].layer][0]
        queries = keys = 0
        for layer, tokens in _tokens(site, shapes).items():
            if layer in (*_QUERY_LAYERS, *_QUERY_NORMS, *_QUERIES_OF_FUSED):
                queries += tokens
            if layer in (*_KEY_LAYERS, *_KEY_NORMS, *_FUSED_LAYERS, _FUSED_WITH_NEURONS):
                keys += tokens
        total += 4 * batch * queries * keys * site.unit_size
    return total


def _tokens(site: Site, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """{layer: tokens that it was given} of the layers that write heads, or of norms in the place of whole ones."""
    return {span.layer.rpartition(".")[2]: shapes[span.layer][-2] for span in site.writers + site.selects}


def _walk(denoiser: nn.Module) -> Iterator[Site | tuple[str, str]]:
    """Yield every site, and (name, reason) for every look-alike."""
    modules = {plain_name(name): module for name, module in denoiser.named_modules()}
    blocks: set[str] = set()  # those whose own layers were looked at
    inside = ""  # the feed-forward whose own parts come next
    for name, module in modules.items():
        if inside and name.startswith(inside):
            continue
        parent = modules.get(name.rpartition(".")[0], denoiser)
        try:
            if _is_attention(module):
                site = _attention(name, module, parent)
                if name.rpartition(".")[0] not in blocks:
                    blocks.add(name.rpartition(".")[0])
                    yield from _feed_forward_of_block(name.rpartition(".")[0], parent)
                yield site
                yield from _whole_layers(name, module, site)
                if hasattr(module, _FUSED_WITH_NEURONS):
                    yield _fused_mlp(name, module)
            elif isinstance(getattr(module, "net", None), nn.ModuleList):
                yield _feed_forward(name, module)
            elif name.rpartition(".")[2] == "proj_mlp":
                yield _parallel_mlp(name, module, parent)
            elif {"silu", "linear", "norm"} <= {child for child, _ in module.named_children()}:
                # A shift, a scale and a gate at least. Norms with two of them (AdaLayerNormContinuous) are no sites.
                if module.linear.out_features >= 3 * module.linear.in_features:
                    yield _modulation(name, module)
            else:
                roles = feed_forward_roles(module) if _may_be_feed_forward(name, module) else None
                if roles is not None:
                    inside = f"{name}."
                    yield _feed_forward_by_role(name, module, roles)
        except _NotASite as reason:
            yield name, str(reason)


def _whole_layers(name: str, module: nn.Module, site: Site) -> Iterator[tuple[str, str]]:
    """(name, reason) of layers of an attention that stay whole when heads go."""
    if not site.selects:
        return
    for layer in _children(module, (*_QUERY_LAYERS, *_KEY_LAYERS)):
        yield f"{name}.{layer}", "a norm sees the channels of all heads together, so it stays whole"


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is built like an attention; the attention of a parallel block (FLUX) has no output layer."""
    writes = any(hasattr(module, name) for name in ("to_q", "to_query", _FUSED_WITH_NEURONS, *_FUSED_LAYERS))
    return writes and any(hasattr(module, name) for name in (*OUTPUT_LAYERS, "pre_only"))


def _may_be_feed_forward(name: str, module: nn.Module) -> bool:
    """Whether a module is part of a numbered block, and no embedder of a time step or a text.

    Embedders have linear layers in pairs, too. They are small, and what they write steers the whole network.
    """
    in_a_block = any(part.isdigit() for part in name.split("."))
    if not in_a_block or any(word in type(module).__name__ for word in ("Embed", "TextProjection")):
        return False
    # A block whose attentions have lost all heads is hardly more than its feed-forward, and no feed-forward itself.
    return not any(is_emptied(part) or _is_attention(part) for part in module.modules())


def _attention(name: str, module: nn.Module, parent: nn.Module) -> Site:
    if getattr(module, "fused_projections", False):
        raise _NotASite("its projections are fused; call unfuse_qkv_projections() first")
    for child, part in module.named_children():
        if child not in _ATTENTION_PARTS and next(part.parameters(), None) is not None:
            raise _NotASite(f"unknown part {child!r}")
    heads = number_of(module, HEADS)
    if heads is None:
        raise _NotASite("it does not say how many heads it has")
    inputs = _children(module, _INPUT_LAYERS)
    fused = _children(module, (*_FUSED_LAYERS, _FUSED_WITH_NEURONS))
    gates = _children(module, _OUTPUT_GATES)
    _check_linear(*inputs.values(), *fused.values(), *gates.values())
    if fused:
        return _fused_attention(name, module, heads, inputs | fused, gates)

    query = next((inputs[layer] for layer in _QUERY_LAYERS if layer in inputs), None)
    if query is None:
        raise _NotASite("no layer of it writes queries")
    outputs = _attention_outputs(name, module, parent, query)
    norms = _norms_over_heads(module, query)
    width = query.out_features  # channels of all heads
    if norms:  # queries keep all rows: how many heads are left stands in what the output layers read
        width = next(iter(outputs.values())).in_features
        inputs = {layer: part for layer, part in inputs.items() if layer in _VALUE_LAYERS}
    if heads < 1 or width % heads:
        raise _NotASite(f"{width} query channels do not divide into {heads} heads")
    head_dim = width // heads
    # With fewer key heads than query heads a unit is one key head and all the query heads that share it.
    units, rest = divmod(min(part.out_features for part in inputs.values()), head_dim)
    if rest or not units or heads % units:
        raise _NotASite("its key heads do not divide its query heads")
    _check_norms(module, head_dim, norms)

    sizes = {layer: part.out_features // units for layer, part in inputs.items()}
    if any(sizes[layer] != width // units for layer in inputs if layer in _QUERY_LAYERS):
        raise _NotASite("its two streams have different widths")
    sizes |= _gate_sizes(gates, units)
    writers = tuple(Span(f"{name}.{layer}", 0, size) for layer, size in sizes.items())
    readers = tuple(Span(layer, 0, width // units) for layer in outputs)
    selects = tuple(Span(f"{name}.{norm}", 0, channels // units) for norm, channels in norms.items())
    layers = {f"{name}.{layer}": part for layer, part in (inputs | gates).items()} | outputs
    site = _site(name, "attention", units, writers, readers, layers)
    return replace(site, selects=selects, min_units=_heads_that_stay(module))


def _children(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """{name: part} of those parts that the module has."""
    parts = {}
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            parts[name] = part
    return parts


def number_of(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The number that a module has under one of these names."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _norms_over_heads(module: nn.Module, query: nn.Linear) -> dict[str, int]:
    """{norm: channels that it returns} of norms that see all channels of queries or keys together (Wan, LTX)."""
    norms = {}
    for name in _HEAD_NORMS:
        norm = getattr(module, name, None)
        size = _norm_size(norm)
        if size is None or number_of(module, HEADS) == 1:
            continue
        layer = query
        if name in _KEY_NORMS:
            layers = ("add_k_proj",) if "added" in name else ("to_k", "to_key")
            layer = next((getattr(module, key) for key in layers if hasattr(module, key)), query)
        if size == layer.out_features:
            norms[name] = returned_channels(norm)
    return norms


def returned_channels(norm: nn.Module) -> int:
    """Channels that a norm over all heads returns: all of them, or those that are left."""
    index = getattr(norm, "index", None)
    return (_norm_size(norm) or 0) if index is None else index.numel()


def _gate_sizes(gates: Mapping[str, nn.Linear], units: int) -> dict[str, int]:
    """{output gate: rows a unit}."""
    sizes = {}
    for layer, part in gates.items():
        sizes[layer], rest = divmod(part.out_features, units)
        if rest:
            raise _NotASite(f"the {part.out_features} rows of its gate {layer!r} do not divide into {units} heads")
    return sizes


def _heads_that_stay(module: nn.Module) -> int:
    """0 where it is known what the attention returns without heads, else 1."""
    return 0 if form_of(module) else 1


def _fused_attention(name: str, module: nn.Module, heads: int, inputs: Mapping[str, nn.Linear], gates) -> Site:
    """An attention with projections that write queries, keys and values one after the other."""
    outputs = _own_outputs(name, module)
    if not outputs:
        raise _NotASite("it has no output layer")
    width = next(iter(outputs.values())).in_features
    if _FUSED_WITH_NEURONS in inputs:
        width = module.inner_dim  # the output layer reads neurons, too
    head_dim = number_of(module, ("head_dim", "dim_heads", "dim_head")) or width // max(heads, 1)
    if heads < 1 or heads * head_dim != width:
        raise _NotASite(f"{width} channels do not divide into {heads} heads of {head_dim}")
    writers = []
    for layer, part in inputs.items():
        blocks, rest = divmod(part.out_features, width)
        if layer == _FUSED_WITH_NEURONS:
            blocks, rest = 3, 0
        if rest:
            raise _NotASite(f"{layer!r} does not write whole queries, keys or values")
        writers += [Span(f"{name}.{layer}", block * width, head_dim) for block in range(blocks)]
    writers += [Span(f"{name}.{layer}", 0, size) for layer, size in _gate_sizes(gates, heads).items()]
    _check_norms(module, head_dim)
    readers = tuple(Span(layer, 0, head_dim) for layer in outputs)
    layers = {f"{name}.{layer}": part for layer, part in {**inputs, **gates}.items()} | outputs
    site = _site(name, "attention", heads, tuple(writers), readers, layers)
    # Where the output layer reads neurons, too, it is not without heads that it returns its bias.
    return replace(site, min_units=1 if _FUSED_WITH_NEURONS in inputs else _heads_that_stay(module))


def _fused_mlp(name: str, module: nn.Module) -> Site:
    """The neurons that a fused projection writes behind queries, keys and values (FLUX.2): the layer is the site."""
    inner, neurons, factor = module.inner_dim, module.mlp_hidden_dim, module.mlp_mult_factor
    layer, output = getattr(module, _FUSED_WITH_NEURONS), module.to_out
    _check_linear(layer, output)
    if neurons == 0:
        raise _NotASite("no unit is left")
    if layer.out_features != 3 * inner + factor * neurons or output.in_features != inner + neurons or factor > 2:
        raise _NotASite("its output layer does not read the heads and the neurons side by side")
    written, read = f"{name}.{_FUSED_WITH_NEURONS}", f"{name}.to_out"
    # The activation halves what is written (Flux2SwiGLU): neuron i owns row i of both halves.
    writers = tuple(Span(written, 3 * inner + part * neurons, 1) for part in range(factor))
    readers = (Span(read, inner, 1),)
    return _site(written, "feed_forward", neurons, writers, readers, {written: layer, read: output})


def _check_norms(module: nn.Module, head_dim: int, over_heads: Collection[str] = ()) -> None:
    """Raise _NotASite for a norm of queries or keys that sees neither one head at a time nor is known to see all."""
    for norm in _HEAD_NORMS:
        size = _norm_size(getattr(module, norm, None))
        if size not in (None, head_dim) and norm not in over_heads:
            raise _NotASite(f"{norm} normalises {size} channels across heads of {head_dim}")


def _own_outputs(name: str, module: nn.Module) -> dict[str, nn.Linear]:
    """{layer name: layer} of the attention's own output layers; in joint attention the text stream has one, too."""
    outputs = {}
    for layer, part in _children(module, OUTPUT_LAYERS).items():
        if isinstance(part, (nn.ModuleList, nn.Sequential)):  # a linear layer and a dropout
            outputs[f"{name}.{layer}.0"] = part[0]
        else:
            outputs[f"{name}.{layer}"] = part
    _check_linear(*outputs.values())
    return outputs


def _attention_outputs(name: str, module: nn.Module, parent: nn.Module, query: nn.Linear) -> dict[str, nn.Linear]:
    """{layer name: layer} of the layers that read the heads."""
    if not _children(module, ("to_out", "out_layer")):
        if isinstance(getattr(parent, "proj_out", None), nn.Module):
            return {_beside(name, "proj_out"): _parallel_reader(parent, module)}
        raise _NotASite("its output layer is not to_out[0]")
    outputs = _own_outputs(name, module)
    widths = {layer.in_features for layer in outputs.values()}
    pruned = any(getattr(norm, "index", None) is not None for norm in module.children())
    if len(widths) > 1 or (widths != {query.out_features} and not pruned):
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


def _feed_forward_by_role(name: str, module: nn.Module, roles: Roles) -> Site:
    """A feed-forward whose layers were found by trying (`ecodiff.method.roles`)."""
    reader = module.get_submodule(roles.reader)
    writers, layers = [], {f"{name}.{roles.reader}": reader}
    for layer, layout in roles.writers:
        layers[f"{name}.{layer}"] = module.get_submodule(layer)
        for offset, size in rows_of_unit(layout, columns_of(reader)):
            writers.append(Span(f"{name}.{layer}", offset, size))
    _check_linear(*[layer for layer in layers.values() if channel_axis(layer) == -1])
    readers = (Span(f"{name}.{roles.reader}", 0, 1),)
    site = _site(name, "feed_forward", columns_of(reader), tuple(writers), readers, layers)
    return replace(site, min_units=0 if roles.without else 1)


def _feed_forward_of_block(name: str, block: nn.Module) -> Iterator[Site]:
    """A feed-forward whose layers stand in the block beside its attention, without a module of their own.

    The layer that reads the units gives the site its name. Only calls of the whole block can show that units are
    removable one by one (`ecodiff.method.trial`).
    """
    layers = {child: layer for child, layer in block.named_children() if isinstance(layer, nn.Linear)}
    for child, reader in layers.items():
        units, width = columns_of(reader), len(reader.weight)
        if units <= width or child in (*OUTPUT_LAYERS, "proj_out"):
            continue
        spans, parts = [], {f"{name}.{child}": reader}
        for other, writer in layers.items():
            if columns_of(writer) == width and len(writer.weight) in (units, 2 * units) and other != "proj_mlp":
                # What is twice as wide holds values and gates of all units, one after the other.
                spans += [Span(f"{name}.{other}", offset, 1) for offset in range(0, len(writer.weight), units)]
                parts[f"{name}.{other}"] = writer
        if spans:
            _check_linear(*parts.values())
            readers = (Span(f"{name}.{child}", 0, 1),)
            yield _site(f"{name}.{child}", "feed_forward", units, tuple(spans), readers, parts)


def _parallel_mlp(name: str, module: nn.Module, parent: nn.Module) -> Site:
    """FLUX's single block: proj_out reads the heads first, then the neurons of proj_mlp."""
    attention = getattr(parent, "attn", None)
    if attention is None or not isinstance(getattr(parent, "proj_out", None), nn.Module):
        raise _NotASite("no attn and proj_out beside it")
    _check_linear(module)
    proj_out = _parallel_reader(parent, attention)
    layer = _beside(name, "proj_out")
    units = neurons_beside(parent)
    if not units:
        raise _NotASite("no unit is left")
    # A gated activation (Ovis) splits the rows into two halves: neuron i owns row i of both.
    writers = tuple(Span(name, offset, 1) for offset in range(0, module.out_features, units))
    readers = (Span(layer, proj_out.in_features - units, 1),)
    return _site(name, "feed_forward", units, writers, readers, {name: module, layer: proj_out})


def neurons_beside(block: nn.Module) -> int | None:
    """Neurons of the ``proj_mlp`` of a parallel block; half of what it writes where the block says so."""
    written = getattr(getattr(block, "proj_mlp", None), "out_features", None)
    said = getattr(block, "mlp_hidden_dim", None)
    if written is not None and said is not None and written == 2 * said:
        return said
    return written


def _parallel_reader(parent: nn.Module, attention: nn.Module) -> nn.Linear:
    """The layer of a parallel block that reads [heads, neurons], checked to be as wide as both together."""
    _check_linear(parent.proj_out)
    heads = attention.to_q.out_features if hasattr(attention, "to_q") else 0
    neurons = neurons_beside(parent)
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
        params += span.size * (layer.weight.shape[1:].numel() + (layer.bias is not None))
    for span in readers:
        params += span.size * len(layers[span.layer].weight)
    unit_size = (readers or writers)[0].size
    return Site(name, kind, units, unit_size, writers, readers, params)


def _beside(name: str, sibling: str) -> str:
    """The name of the module ``sibling`` in the module that holds ``name``."""
    return f"{name.rpartition('.')[0]}.{sibling}".lstrip(".")


def _check_linear(*layers: nn.Module) -> None:
    """Raise _NotASite for layers whose rows and columns cannot be cut out of their weights."""
    for layer in layers:
        if is_emptied(layer):
            raise _NotASite("no unit is left")
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
