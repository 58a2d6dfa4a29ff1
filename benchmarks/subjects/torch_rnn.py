"""`torch.nn.RNN`, on the CPU and as cuDNN runs it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measures import BACKWARD, FORWARD, HVP, JVP, PARAMETERS
from benchmarks.side import NotOfferedError
from benchmarks.subjects.registry import TorchOptions
from benchmarks.workloads import Data, Workload


class Built(NamedTuple):
    """One subject on one workload.

    Args:
      measures: what each measure calls; on a GPU a call returns before its result is there.
      results: computes (hs, dU, dW, db, dxs) as float64 NumPy arrays of Data's layout, dxs None
        for ids.
      reasons: why a measure is left out.
      unload: `unload(measure, result)`: what a measure's call returned as float64 NumPy arrays
        of Data's layout: (hs,), (dU, dW, db, dxs) or (dU, dW, db), (hs, tangent of hs), or the
        Hessian's product as (dU, dW, db).
    """

    measures: dict[str, Callable[[], Any]]
    results: Callable[[], tuple[np.ndarray | None, ...]]
    reasons: dict[str, str]
    unload: Callable[[str, Any], tuple[np.ndarray, ...]]


def build(
    workload: Workload, data: Data, options: TorchOptions, tangent: Data | None = None
) -> Built:
    """What is measured of `nn.RNN`; for an ensemble a loop over the members' layers.

    Args:
      workload: the shapes.
      data: the numbers.
      options: device, dtype and so on.
      tangent: the direction of "jvp" and of the "Hessian-vector product"; by default the
        weights and the inputs themselves.

    Returns:
      A `Built`.

    Raises:
      NotOfferedError: the network is more than one layer of some φ, or in a dtype of its own.
    """
    if not workload.network.plain or workload.dtype not in (None, options.dtype):
        raise NotOfferedError("it is measured with one layer without more only")
    phi = workload.network.activation
    # torch.func.vmap has no rule for rnn_tanh (torch 2.13), so members are a loop.
    layers = [_layer(member, options, phi) for member in _members(data)]
    parameters = [list(layer.parameters()) for layer in layers]
    flat = [parameter for each in parameters for parameter in each]
    g, xs = _tensor(data.g, options), _tensor(data.xs, options)
    if workload.ids:
        xs = torch.as_tensor(data.ids, device=options.device).long()
    called = [_compiled(layer, options) for layer in layers]
    # cuDNN in training mode keeps what a backward needs.
    still = [_compiled(_layer(member, options, phi).eval(), options) for member in _members(data)]

    def inputs():
        return torch.nn.functional.one_hot(xs, workload.D).to(g.dtype) if workload.ids else xs

    def loss(xs):
        return sum((layer(xs)[0] * g).sum() for layer in called)

    def forward():
        with torch.inference_mode():
            xs = inputs()
            return [layer(xs)[0] for layer in still]

    def parameters_only():
        return torch.autograd.grad(loss(inputs()), flat)

    def backward():
        if workload.ids:
            return parameters_only()
        xs = inputs().detach().requires_grad_()
        return torch.autograd.grad(loss(xs), [*flat, xs])

    measures = {FORWARD: forward, BACKWARD: backward, PARAMETERS: parameters_only}
    reasons = {}
    if options.device == "cuda":
        reasons[JVP] = "cuDNN's recurrent layers have no forward mode"
        reasons[HVP] = "cuDNN's recurrent layers have no double backward"
    else:
        moved = data if tangent is None else tangent
        tangents = [_values(member, options) for member in _members(moved)]
        dxs = torch.zeros_like(inputs()) if workload.ids else _tensor(moved.xs, options)
        flat_tangents = [value for each in tangents for value in each]
        measures[JVP] = lambda: _jvp(called, parameters, tangents, inputs(), dxs)
        measures[HVP] = lambda: _hvp(loss(inputs()), flat, flat_tangents)
    timed = {name: _timed(measure, options) for name, measure in measures.items()}
    unload = partial(_unload, workload)

    def results():
        found = unload(FORWARD, timed[FORWARD]()) + unload(BACKWARD, timed[BACKWARD]())
        return (*found, None) if workload.ids else found

    return Built(timed, results, reasons, unload)


def _unload(workload, measure, result):
    """A measure's result as float64 NumPy arrays of Data's layout."""
    dxs, few = [], workload.compared
    if measure == FORWARD:
        parts = [[hs[:, few] for hs in result]]
    elif measure == JVP:
        parts = list(zip(*result, strict=True))
    else:
        if len(result) % 4:
            *result, last = result
            dxs = [_numpy(last[:, few])]
        # Four parameters a layer; the second bias is torch's alone, its gradient the first's.
        parts = [result[n::4] for n in range(3)]
    members = [np.stack([_numpy(member) for member in part]) for part in parts]
    return (*(part if workload.members else part[0] for part in members), *dxs)


def _members(data):
    if data.W.ndim == 2:
        return [(data.U, data.W, data.b)]
    return list(zip(data.U, data.W, data.b, strict=True))


def _layer(member, options, activation="tanh"):
    H, D = member[0].shape
    dtype = getattr(torch, options.dtype)
    layer = torch.nn.RNN(D, H, nonlinearity=activation, device=options.device, dtype=dtype)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), _values(member, options), strict=True):
            parameter.copy_(value)
    return layer


def _compiled(layer, options):
    # Without fullgraph, torch.compile would leave the layer out silently and run it as it is.
    return torch.compile(layer, fullgraph=True) if options.compile else layer


def _values(member, options):
    """The layer's four parameters, the second bias 0."""
    U, W, b = (_tensor(array, options) for array in member)
    return [U, W, b, torch.zeros_like(b)]


def _tensor(array, options):
    return torch.as_tensor(array, device=options.device).to(getattr(torch, options.dtype))


def _numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def _jvp(layers, parameters, tangents, xs, dxs):
    """(hs, tangent of hs) of each member."""

    def states(layer):
        names = [name for name, _ in layer.named_parameters()]

        def of(values, xs):
            values = dict(zip(names, values, strict=True))
            return torch.func.functional_call(layer, values, (xs,))[0]

        return of

    each = zip(layers, parameters, tangents, strict=True)
    return [torch.func.jvp(states(layer), (p, xs), (dp, dxs)) for layer, p, dp in each]


def _hvp(loss, parameters, tangents):
    """The Hessian in the parameters times a vector, by a double backward.

    It takes half the time of forward mode over a backward (torch 2.13, CPU).
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(gradients, parameters, tangents)


def _timed(function, options):
    """The function under the precision that is asked for."""
    if options.device != "cuda":
        return function

    def call():
        _set_tf32(options.tf32)
        return function()

    return call


def _set_tf32(on):
    # Subjects run in turn in one process, and these are the process's settings.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "rnn") and hasattr(cudnn.rnn, "fp32_precision"):
        matmul.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if on else "ieee"
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = on
