"""Linear layers and convolutions of one place: how they are cut, and what is left of one that has lost everything."""

from __future__ import annotations

from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def channel_axis(layer: nn.Module) -> int:
    """The dimension of a layer's input and output that holds channels."""
    return 1 if isinstance(layer, _CONVOLUTIONS) else -1


def columns_of(layer: nn.Module) -> int:
    """How many channels a linear layer or convolution reads."""
    return layer.in_channels if isinstance(layer, _CONVOLUTIONS) else layer.in_features


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution as [rows, columns]; a view."""
    return layer.weight.flatten(1)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether this is a convolution that mixes places and no channels."""
    return isinstance(layer, _CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def is_pointwise(layer: nn.Module) -> bool:
    """Whether this is a linear layer, or a convolution that is one."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, _CONVOLUTIONS) or layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    return set(layer.kernel_size) == {1} and set(layer.stride) == {1} and layer.padding in ((0,) * len(layer.stride), 0)


def cut_layer(layer: nn.Module, dimension: int, entries: Tensor) -> None:
    """Keep some rows (dimension 0) or columns (1) of a linear layer or convolution, in place."""

    def cut(parameter, dimension):
        index = entries.nonzero().flatten().to(parameter.device)
        return nn.Parameter(parameter.detach().index_select(dimension, index), parameter.requires_grad)

    depthwise = is_depthwise(layer)
    layer._parameters["weight"] = cut(layer.weight, dimension)
    if dimension == 0 and layer.bias is not None:
        layer._parameters["bias"] = cut(layer.bias, 0)
    rows, columns = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = rows, columns
    elif depthwise:
        layer.out_channels = layer.in_channels = layer.groups = rows
    else:
        layer.out_channels, layer.in_channels = rows, columns


class EmptiedLayer(nn.Module):
    """A linear layer or convolution without columns or rows: it returns its bias (else zeros), or no channels."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.axis = channel_axis(layer)
        self.in_features, self.out_features = columns_of(layer), len(layer.weight)
        # What the layer had before, without entries: recorded hashes of weights count these tensors.
        self.empty_tensors = {"weight": tuple(layer.weight.shape)}
        if layer.bias is not None and not self.out_features:
            self.empty_tensors["bias"] = (0,)
        self.register_parameter("bias", None)
        self._parameters["bias"] = layer.bias if self.out_features else None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        shape = list(x.shape)
        shape[self.axis] = self.out_features
        output = x.new_zeros(shape)
        if self.bias is None:
            return output
        # Layerwise casting stores weights in another dtype than it computes in.
        bias = self.bias.to(x.dtype)
        if self.axis == 1:
            bias = bias.view(-1, *[1] * (x.ndim - 2))
        return output + bias
