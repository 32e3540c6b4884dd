"""Putting TTT into a model: plan (validate everything), apply, eject.

A site is a module of the backbone. Injection turns it into an instance of a subclass of its own class, which calls the
adapter at the place where TTT goes, and makes the adapter its child. So every parameter keeps its name, and wrappers
that look for the original class still find it. Ejection restores the class and removes the child. Nothing changes
until the whole plan is checked; if something fails, what was done is undone.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt.adapter import TTTAdapter
from ttt.config import TTTConfig
from ttt.config.lora import LoraSettings
from ttt.config.schema import select_layers
from ttt.errors import InjectionError, UsageError
from ttt.layer import TTTLayer
from ttt.layer_inputs import check_head_width
from ttt.lora import Lora, LoraPlan, keep_where_absent
from ttt.plugins.site import Site


@dataclass(frozen=True)
class Plan:
    """The chosen sites, checked; `apply` injects TTT into them."""

    sites: tuple[Site, ...]
    config: TTTConfig


class Injection:
    """TTT in a model: its adapters, and `eject` to take them out again."""

    def __init__(
        self, model: nn.Module, plan: Plan, originals: Sequence[type[nn.Module]], lora: Lora | None = None
    ) -> None:
        self.model = model
        """The adapted model: the object that was given to `apply`."""
        self.config = plan.config
        """The `ttt` section."""
        self.sites = plan.sites
        """The sites that have an adapter, in order of layers."""
        self._prepared: Prepared = {}
        self.lora = lora
        """LoRA beside the adapters, or alone; None if there is none."""
        self._originals = tuple(originals)
        self._ejected = False
        self._rounded = False

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """The adapters by site name, in order of layers; empty once ejected."""
        return {} if self._ejected else {site.name: getattr(site.module, site.attribute) for site in self.sites}

    def for_inference(self) -> None:
        """Hold the TTT layers for inference, in the types of their sites' parameters, for a model that only reads.

        A token then finds what depends on parameters alone as it needs it; see `TTTLayer.hold_for_inference`. Whole
        sequences are answered as before, bit for bit, single tokens to rounding. In a bfloat16 backbone this also
        spares each token the casts of four matrices for each layer, and half their memory; the float32 values are given
        up, so that the adapters can be neither saved nor loaded afterwards.
        """
        for name, adapter in self.adapters.items():
            site = next(site for site in self.sites if site.name == name)
            # Tokens are of the type of the module's own parameters.
            own = next((p.dtype for p in _beside_adapter(site) if p.is_floating_point()), None)
            for layer in adapter.modules():
                if not isinstance(layer, TTTLayer):
                    continue
                narrow = own in (torch.bfloat16, torch.float16)
                if own is not None and (narrow or layer.ttt_norm_weight.dtype == own):
                    layer.hold_for_inference(own)
                    self._rounded |= narrow

    def require_masters(self) -> None:
        """Refuse to save adapters, or to load values into them, if theirs have been rounded.

        Raises:
            UsageError: `for_inference` has rounded them.
        """
        if self._rounded:
            raise UsageError(
                "this model is for inference alone: its adapters' projections are rounded to the backbone's type; save "
                "and load adapters of a model for which `for_inference` was not called"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters' parameters, LoRA's included, under their names in the model; none of the backbone's."""
        of_ttt = {
            f"{name}.{key}": value
            for name, adapter in self.adapters.items()
            for key, value in adapter.state_dict().items()
        }
        return {**of_ttt, **{name: value.detach() for name, value in self.lora_parameters.items()}}

    @property
    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's parameters under their names in the model; empty if there is none."""
        return {} if self.lora is None else self.lora.parameters()

    @property
    def lora_settings(self) -> LoraSettings | None:
        """Rank, scaling and linear layers of LoRA; None if there is none."""
        return None if self.lora is None else self.lora.settings

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the adapters' parameters.

        Raises:
            InjectionError: a name is missing, unknown, or has another shape; nothing is copied then.
            UsageError: `for_inference` has rounded the adapters.
        """
        self.require_masters()
        own = self.state_dict()
        problems = [f"{name} is missing" for name in own if name not in tensors]
        problems += [f"{name} is unknown" for name in tensors if name not in own]
        problems += [
            f"{name} is {list(tensors[name].shape)}, not {list(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        if problems:
            raise InjectionError(f"these tensors do not fit the adapters: {'; '.join(problems)}")
        for name, adapter in self.adapters.items():  # by its own method, so that its hooks know of it
            adapter.load_state_dict({key: tensors[f"{name}.{key}"] for key in adapter.state_dict()})
        with torch.no_grad():
            for name, parameter in self.lora_parameters.items():
                parameter.copy_(tensors[name])

    @property
    def prepared(self) -> tuple[int, ...]:
        """The layers that `prepare` changed and that have no adapter, beside LoRA alone."""
        return tuple(self._prepared)

    def takes_over(self, prepared: Prepared) -> None:
        """Undo on ejection what `prepare` did to the plain model."""
        self._prepared = prepared

    def eject(self) -> None:
        """Restore the model as it was. A second call does nothing."""
        if not self._ejected:
            for undo in self._prepared.values():
                undo()
            self._prepared = {}
            if self.lora is not None:
                self.lora.remove()
            _detach_all(self.sites, self._originals)
            self._ejected = True


def plan(sites: Sequence[Site], config: TTTConfig, *, causal: bool = True, model: nn.Module | None = None) -> Plan:
    """Choose the sites that the config names and check everything that could fail.

    Args:
        sites: what the backbone offers, one for each layer.
        config: the `ttt` section.
        causal: whether the backbone is causal.
        model: the model of the sites, to check that each path leads to its module; None leaves the paths unchecked.

    Raises:
        InjectionError: a layer does not exist, heads do not fit, the update is not causal on a causal backbone, TTT
            is already injected, a path does not lead to its module, or a site would change the backbone's own
            parameters.
    """
    by_layer = {site.layer: site for site in sites}
    if len(by_layer) != len(sites):
        raise InjectionError("the backbone offers two sites for one layer")
    if sorted(by_layer) != list(range(len(sites))):
        numbers = ", ".join(map(str, sorted(by_layer)))
        raise InjectionError(
            f"the backbone numbers the layers of its {len(sites)} sites {numbers}; they count from 0 without a gap"
        )
    if len({(id(site.module), site.attribute) for site in sites}) != len(sites):
        raise InjectionError("the backbone offers one module as the site of two layers, which can hold one adapter")
    try:
        chosen = tuple(by_layer[layer] for layer in select_layers(config.layers, len(sites)))
        for site in chosen:
            check_head_width(site.dim, config.num_heads or site.num_heads, config)
    except ValueError as error:
        raise InjectionError(f"ttt: {error}") from None
    if causal and not config.causal and config.mini_batch_size > 1:
        raise InjectionError(
            "ttt.causal: false on a causal backbone lets a token learn from later ones of its mini-batch; write "
            "causal: true"
        )
    for site in chosen:
        if not site.attribute.isidentifier() or keyword.iskeyword(site.attribute):
            raise InjectionError(
                f"the site of layer {site.layer}: its attribute {site.attribute!r} is not a name that a module can "
                f"give a child; write one such as 'ttt'"
            )
        if hasattr(site.module, site.attribute):
            raise InjectionError(f"{site.name} is there already; eject the first injection before another")
        if not issubclass(site.subclass, type(site.module)):
            raise InjectionError(
                f"{site.path} is a {type(site.module).__name__}, and {site.subclass.__name__} is not a subclass of that"
            )
    if model is not None:
        _require_paths(model, chosen)
    return Plan(chosen, config)


_WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names that `torch.compile`, DDP, checkpointing and FSDP give the module they wrap; a path may leave them out."""


def _require_paths(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a path that does not lead to the site's module: the adapter could be trained, but not loaded again.

    Raises:
        InjectionError: naming what the path leads to, and the module's own path.
    """
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    for site in sites:
        at = paths.get(id(site.module))
        if at is None:
            raise InjectionError(
                f"the site of layer {site.layer} ({site.path!r}): its {type(site.module).__name__} is not a module of "
                f"the model; offer the modules of the model that is injected into"
            )
        if site.path not in (at, _without_wrappers(at, modules)):
            raise InjectionError(
                f"the site of layer {site.layer}: its path {site.path!r} {_in_words(model, site)}; its module, a "
                f"{type(site.module).__name__}, goes by {at!r} in the model: write that, so that its adapter can be "
                f"loaded again"
            )


def _without_wrappers(path: str, modules: Mapping[str, nn.Module]) -> str:
    parts = path.split(".")
    above = [type(modules[".".join(parts[:index])]).__module__ for index in range(len(parts))]
    return ".".join(
        part for part, kind in zip(parts, above, strict=True) if part not in _WRAPPERS or not kind.startswith("torch.")
    )


def _in_words(model: nn.Module, site: Site) -> str:
    """Say what a site's path leads to instead of its module."""
    try:
        there = model.get_submodule(site.path)
    except AttributeError:
        return "names no module of the model"
    if there is site.module:  # the module is registered twice
        return "is a second name of its module"
    return f"leads to another module, a {type(there).__name__}"


def apply(
    model: nn.Module,
    sites: Sequence[Site],
    config: TTTConfig,
    *,
    causal: bool = True,
    seed: int = 0,
    lora: LoraPlan | None = None,
) -> Injection:
    """Inject TTT into the model, in place; LoRA beside it, or, if the config names no layer, alone.

    Each adapter is made on its site's device and in its train or eval mode, in float32, or in float64 if the site is.
    Its values depend on the seed and the layer alone. A state dict of the plain backbone still loads into the adapted
    model: an adapter that it does not hold stays as it is.

    Args:
        model: the model of the sites.
        sites: what the backbone offers.
        config: the `ttt` section.
        causal: whether the backbone is causal.
        seed: seed of the adapters' initial values.
        lora: where LoRA goes; None leaves it out.

    Raises:
        InjectionError: see `plan` and `ttt.lora.Lora`; the model is then unchanged.
    """
    planned = plan(sites, config, causal=causal, model=model)
    adapters = [_make_adapter(model, site, config, seed) for site in planned.sites]
    if len({id(adapter) for adapter in adapters}) != len(adapters):
        raise InjectionError("the backbone's sites share one adapter; each layer needs an adapter of its own")
    originals = [type(site.module) for site in planned.sites]
    try:
        for site, adapter in zip(planned.sites, adapters, strict=True):
            site.attach(adapter)
        added = None if lora is None else Lora(model, lora, seed=seed)
    except BaseException:
        _detach_all(planned.sites, originals)
        raise
    return Injection(model, planned, originals, added)


Prepared = Mapping[int, Callable[[], None]]
"""The layers of a plain model that `Site.prepare` changed, each with what undoes it."""


def prepare(sites: Sequence[Site], config: TTTConfig, *, causal: bool = True) -> Prepared:
    """Give the plain model what layers with TTT have beside their adapters (`Site.prepare`), where the config names it.

    Raises:
        InjectionError: see `plan`.
    """
    return prepared_of(plan(sites, config, causal=causal).sites)


def prepared_of(sites: Sequence[Site]) -> Prepared:
    """Prepare these sites."""
    undoing = {site.layer: site.prepare() for site in sites}
    return {layer: undo for layer, undo in undoing.items() if undo is not None}


def bare_adapter(
    site: Site, config: TTTConfig, *, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Make a site's adapter without injecting it; on the device `meta` it has names and shapes but takes no memory."""
    return (site.adapter or TTTAdapter)(site.dim, site.num_heads, config, device=device, dtype=dtype)


def _beside_adapter(site: Site) -> Iterator[Tensor]:
    """The parameters of a site's module beside its adapter's."""
    beside = f"{site.attribute}."
    return (value for name, value in site.module.named_parameters() if not name.startswith(beside))


def _make_adapter(model: nn.Module, site: Site, config: TTTConfig, seed: int) -> nn.Module:
    # A site may have no parameters of its own; then take those of the model.
    reference: Tensor = next(itertools.chain(site.module.parameters(), model.parameters()), torch.empty(0))
    dtype = torch.promote_types(reference.dtype, torch.float32)
    adapter = bare_adapter(site, config, device=reference.device, dtype=dtype)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + site.layer) % (1 << 63))
    for module in adapter.modules():
        if isinstance(module, TTTLayer):
            module.reset_parameters(generator)
    adapter.train(site.module.training)
    adapter.register_load_state_dict_pre_hook(keep_where_absent)
    return adapter


def _detach_all(sites: Sequence[Site], originals: Sequence[type[nn.Module]]) -> None:
    for site, original in zip(sites, originals, strict=True):
        site.detach(original)
