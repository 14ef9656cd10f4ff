"""What the tests of the algorithms share.

Golden vectors: Keras' weight layouts to PyTorch's, recorded draws, comparisons with their tolerances. Any script: what
its functions are called with, and which operations run.
"""

import inspect
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def load(name: str) -> dict:
    """The arrays of golden/<name>.npz as tensors, its texts as str or lists of them."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {key: a.tolist() if a.dtype.kind == "U" else torch.from_numpy(a) for key, a in arrays.items()}


# LAYOUTS: Keras arrays of a layer -> the parameters of its PyTorch module; for gradients as for weights.


def dense(arrays: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Dense (in, out) -> nn.Linear."""
    return {"weight": arrays[f"{layer}/kernel"].T, "bias": arrays[f"{layer}/bias"]}


def conv(arrays: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Conv2D (kh, kw, in, out) -> nn.Conv2d, and Conv2DTranspose (kh, kw, out, in) -> nn.ConvTranspose2d."""
    return {"weight": arrays[f"{layer}/kernel"].permute(3, 2, 0, 1), "bias": arrays[f"{layer}/bias"]}


def layer_norm(arrays: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """LayerNormalization -> nn.LayerNorm."""
    return {"weight": arrays[f"{layer}/gamma"], "bias": arrays[f"{layer}/beta"]}


def gru(arrays: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """GRUCell with reset_after, columns z, r, h -> nn.GRUCell, rows r, z, n."""

    def reorder(columns: Tensor) -> Tensor:
        update, reset, candidate = columns.chunk(3, -1)
        return torch.cat([reset, update, candidate], -1)

    return {
        "weight_ih": reorder(arrays[f"{layer}/kernel"]).T,
        "weight_hh": reorder(arrays[f"{layer}/recurrent_kernel"]).T,
        "bias_ih": reorder(arrays[f"{layer}/bias"][0]),
        "bias_hh": reorder(arrays[f"{layer}/bias"][1]),
    }


def parameters(arrays: dict[str, Tensor], prefix: str, layers: dict[str, tuple]) -> dict[str, Tensor]:
    """PyTorch parameters by name. `layers`: name of the PyTorch module -> (layout, Keras layer below `prefix`)."""
    return {
        f"{module}.{name}" if module else name: value
        for module, (layout, layer) in layers.items()
        for name, value in layout(arrays, f"{prefix}/{layer}").items()
    }


def time_major(x: Tensor) -> Tensor:
    """(B, T, ...) -> (T, B, ...)"""
    return x.transpose(0, 1).contiguous()


# DRAWS


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mode(logit: Tensor) -> Tensor:
    """In the place of `sample_onehot`: the most likely class, without gradient."""
    return F.one_hot(logit.argmax(-1), logit.shape[-1]).float()


class Draws:
    """Stands in for a script's `sample_normal` and gives recorded noise, one tensor a call, then zeros.

    A draw of another shape than the recorded one is an error; `used_up` says whether all were asked for.
    """

    def __init__(self, *noises: Tensor):
        self.noises = list(noises)

    def __call__(self, mean: Tensor, std: Tensor) -> Tensor:
        noise = self.noises.pop(0) if self.noises else torch.zeros_like(mean)
        assert noise.shape == mean.shape, f"recorded noise {tuple(noise.shape)} for a draw {tuple(mean.shape)}"
        return mean + std * noise

    @property
    def used_up(self) -> bool:
        return not self.noises


# COMPARISONS


def step_by_step(rssm: nn.Module, embed: Tensor, action: Tensor, is_first: Tensor) -> tuple:
    """Posterior states, fields (T, B, ...), by one `observe_step` after the other."""
    states, state = [], rssm.initial(embed.shape[1])
    for step in zip(action, rssm.project_embed(embed), is_first, strict=True):
        state = rssm.observe_step(state.stoch, state.deter, *step)
        states.append(state)
    return type(state)(*(torch.stack(fields) for fields in zip(*states, strict=True)))


def check(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = 1e-5) -> None:
    """Values agree to `tolerance` * max(1, largest expected)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = ((actual.detach() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check_gradient(actual: Tensor | None, expected: Tensor, name: str = "", tolerance: float = 5e-5) -> None:
    """Gradients agree to `tolerance` * largest expected entry. None stands for zeros; zeros must be zeros."""
    actual = torch.zeros_like(expected) if actual is None else actual
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"{name}: gradient off by {error:.1e}, the largest entry is {scale:.1e}"


def check_gradients(module: nn.Module, gradients, expected: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    """The gradients of every parameter of `module`, in its order, against PyTorch-named expected ones."""
    names = [name for name, _ in module.named_parameters()]
    assert set(names) == set(expected)
    for name, gradient in zip(names, gradients, strict=True):
        check_gradient(gradient, expected[name], name, tolerance)


# WATCHING A SCRIPT


def watch(owner, monkeypatch, name: str) -> list[tuple[dict, object]]:
    """The arguments, by name, and the result of each call to the function `name` of a script or class from now on."""
    function, calls = getattr(owner, name), []
    signature = inspect.signature(function)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((signature.bind(*args, **kwargs).arguments, result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


def check_policy(script, monkeypatch, agent: nn.Module) -> list[bool]:
    """From now on `actor_loss` must get the actor's distributions at all imagined states but the last two, with the
    gradients of the actor's weights. Returns a list that grows with each call."""
    imagined, loss, calls = watch(script, monkeypatch, "imagine"), script.actor_loss, []

    def watched(policy, *others):
        expected, weights = agent.actor(imagined[-1][1][0][:-2].detach()), list(agent.actor.parameters())
        cotangents = [noise(*field.shape) for field in expected]
        gradients = torch.autograd.grad(policy, weights, cotangents, retain_graph=True)
        for field, other in zip(policy, expected, strict=True):
            check(field, other)
        for gradient, other in zip(gradients, torch.autograd.grad(expected, weights, cotangents), strict=True):
            check_gradient(gradient, other)
        calls.append(True)
        return loss(policy, *others)

    monkeypatch.setattr(script, "actor_loss", watched)
    return calls


class Record(TorchDispatchMode):
    """The operations that run, with the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
        self.operations.append((str(function), shapes))
        return function(*args, **kwargs or {})
