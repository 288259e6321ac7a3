"""What diffusers is told about pruned models, once both it and this package are imported.

A pruned folder is meant for scripts that were written for any model of its class. diffusers however goes by the names
and identities of classes in a few places: it takes components from the libraries of a list alone when it fetches a
pipeline from the Hub, its model classes read a folder without asking which class wrote it (and its error then advises
what leaves weights random), and `from_pipe` passes on components of exactly the class that it expects.

So, as soon as the module that does this is imported, it is told: `PrunedXxx` is an `Xxx`. Importing this package stays
quick, as diffusers is not imported for this.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
from functools import wraps


def _pipelines_come_from_here(module) -> None:
    """`DiffusionPipeline.from_pretrained` of a Hub id takes components of this package."""
    module.LOADABLE_CLASSES.setdefault("ecodiff", {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    class_and_candidates = module.get_class_obj_and_candidates

    @wraps(class_and_candidates)
    def from_here(library_name, class_name, *args, **kwargs):
        if library_name == "diffusers" and class_name.startswith("Pruned"):  # as AutoModel reads it from a config
            library_name = "ecodiff"
        return class_and_candidates(library_name, class_name, *args, **kwargs)

    module.get_class_obj_and_candidates = from_here


def _models_know_their_pruned_class(module) -> None:
    """`Xxx.from_pretrained` gives a `PrunedXxx` where the folder's config says so."""
    from_pretrained = module.ModelMixin.from_pretrained.__func__

    @wraps(from_pretrained)
    def from_pretrained_or_pruned(cls, pretrained_model_name_or_path, **kwargs):
        if not _is_pruned_class(cls) and _says_pruned(_config(cls, pretrained_model_name_or_path, kwargs)):
            return _pruned_like(cls).from_pretrained(pretrained_model_name_or_path, **kwargs)
        return from_pretrained(cls, pretrained_model_name_or_path, **kwargs)

    module.ModelMixin.from_pretrained = classmethod(from_pretrained_or_pruned)


def _configs_know_their_pruned_class(module) -> None:
    """`Xxx.from_config` gives a `PrunedXxx` where the config says so."""
    from_config = module.ConfigMixin.from_config.__func__

    @wraps(from_config)
    def from_config_or_pruned(cls, config=None, return_unused_kwargs=False, **kwargs):
        if not _is_pruned_class(cls):
            told = config if isinstance(config, dict) else _local_config(config, kwargs.get("subfolder"))
            if _says_pruned(told):
                return _pruned_like(cls).from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return from_config(cls, config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    module.ConfigMixin.from_config = classmethod(from_config_or_pruned)


def _pipelines_pass_pruned_parts_on(module) -> None:
    """`from_pipe` passes a `PrunedXxx` on to a pipeline that expects an `Xxx`."""
    cls = module.DiffusionPipeline
    signature_types = cls._get_signature_types.__func__

    @wraps(signature_types)
    def types_and_their_pruned_classes(cls):
        return {name: _Types(types) for name, types in signature_types(cls).items()}

    cls._get_signature_types = classmethod(types_and_their_pruned_classes)


def _motion_models_take_pruned_unets(module) -> None:
    """`UNetMotionModel.from_unet2d` of a pruned U-Net has its units, and all of the motion modules."""
    owner = module.UNetMotionModel
    from_unet2d = owner.from_unet2d.__func__

    @wraps(from_unet2d)
    def from_pruned_too(cls, unet, motion_adapter=None, load_weights=True):
        from ecodiff.method.kept import ENTRIES

        if not _is_pruned_class(type(unet)):
            return from_unet2d(cls, unet, motion_adapter, load_weights)
        config = dict(from_unet2d(cls, unet, motion_adapter, load_weights=False).config)
        config |= {name: unet.config[name] for name in ENTRIES if name in unet.config}
        model = cls.from_config(config)
        if not load_weights:
            return model
        model.load_state_dict(unet.state_dict(), strict=False)  # what it lacks are the motion modules
        if motion_adapter is not None:
            model.load_motion_modules(motion_adapter)
        return model.to(device=unet.device, dtype=unet.dtype)

    owner.from_unet2d = classmethod(from_pruned_too)


def _made_from_the_original(method_name: str):
    """For a module of diffusers that makes a model from another's weights: the original's are what fits."""

    def tell(module) -> None:
        for cls in list(vars(module).values()):
            method = vars(cls).get(method_name) if isinstance(cls, type) and cls.__module__ == module.__name__ else None
            if isinstance(method, classmethod):
                setattr(cls, method_name, classmethod(_refusing_pruned(cls, method.__func__)))

    return tell


def _refusing_pruned(owner: type, method):
    @wraps(method)
    def made(cls, model, *args, **kwargs):
        if _is_pruned_class(type(getattr(model, "_orig_mod", model))):
            from .errors import EcoDiffError

            raise EcoDiffError(
                f"{owner.__name__}.{method.__name__}: this {type(model).__name__} lacks units, so its weights do not "
                f"fit {owner.__name__}. Make it from the original: what is made for the original works beside the "
                "pruned model as it is."
            )
        return method(cls, model, *args, **kwargs)

    return made


_CONTROLNETS = "diffusers.models.controlnets.controlnet"
_TOLD = {
    "diffusers.pipelines.pipeline_loading_utils": _pipelines_come_from_here,
    "diffusers.configuration_utils": _configs_know_their_pruned_class,
    "diffusers.models.modeling_utils": _models_know_their_pruned_class,
    "diffusers.pipelines.pipeline_utils": _pipelines_pass_pruned_parts_on,
    "diffusers.models.unets.unet_motion_model": _motion_models_take_pruned_unets,
    **{f"{_CONTROLNETS}{kind}": _made_from_the_original("from_unet") for kind in ("", "_union", "_sparsectrl", "_xs")},
    **{
        f"{_CONTROLNETS}_{kind}": _made_from_the_original("from_transformer")
        for kind in ("flux", "sd3", "hunyuan", "qwenimage")
    },
}


def tell_diffusers() -> None:
    """Have every module of diffusers that has to know of pruned models told, now or when it is imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, tell in _TOLD.items():
        if name in sys.modules:
            tell(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_TOLD` as Python would, and has them told once they have run."""

    def find_spec(self, name, path=None, target=None):
        """The module's own spec with a loader that tells it; None for all other modules."""
        if name not in _TOLD:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader does, then tells it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        """What the module's own loader makes."""
        return self._loader.create_module(spec)

    def exec_module(self, module):
        """Run the module, then tell it."""
        self._loader.exec_module(module)
        _TOLD[module.__name__](module)


class _Types(tuple):
    """Classes that a component may be of; pruned classes are among them where their own class is."""

    def __contains__(self, cls) -> bool:
        if isinstance(cls, type) and _is_pruned_class(cls):
            return any(super(_Types, self).__contains__(base) for base in cls.__mro__)
        return super().__contains__(cls)


def _is_pruned_class(cls: type) -> bool:
    return any(base.__name__ == "PrunedMixin" and base.__module__ == "ecodiff.method.pruned" for base in cls.__mro__)


def _says_pruned(config) -> bool:
    return isinstance(config, dict) and "pruned_units" in config


def _pruned_like(cls: type):
    from .method.surgery import pruned_like

    return pruned_like(cls)


def _local_config(path, subfolder=None):
    """The config of a folder on this disk; None where there is none that can be read."""
    try:
        with open(os.path.join(path, subfolder or "", "config.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, TypeError):
        return None


_OF_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def _config(cls, path, options: dict):
    """The config of a folder, or of a Hub id, which from_pretrained reads anyway; None where there is none."""
    if path is None or os.path.isdir(path) or os.path.isfile(path):
        return _local_config(path, options.get("subfolder"))
    try:
        return cls.load_config(path, **{name: options[name] for name in _OF_HUB if name in options})
    except Exception:  # whatever it is, from_pretrained meets it as well and says so in its own words
        return None
