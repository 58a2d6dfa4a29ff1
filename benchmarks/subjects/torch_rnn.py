"""`torch.nn.RNN`, on the CPU and as cuDNN runs it: `prepare` is torch's side of a worker."""

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.subjects import NotOfferedError, Prepared, only_plain, parameter_names
from benchmarks.subjects.registry import Subject
from benchmarks.workloads import BACKWARD, FORWARD, Data, Workload

# Where layers are; a worker on a GPU sets it to "cuda".
DEVICE = "cpu"


def machine() -> dict[str, Any]:
    """The accelerator's name or None as "gpu", the version of cuDNN, and torch's threads."""
    on_gpu = DEVICE == "cuda" and torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if on_gpu else None
    cudnn = torch.backends.cudnn.version() if on_gpu else None
    return {"gpu": gpu, "cudnn": cudnn, "threads": torch.get_num_threads()}


def check_device(_: Any = None) -> None:
    """Wait for all that was queued on a GPU: an error where it computes no more."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def prepare(
    subject: Subject, workload: Workload, measure: str, data: Data, tangent: Data
) -> Prepared:
    """The layer on a workload, called once; for an ensemble a loop over the members' layers."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise ImportError("this build of torch has no CUDA")
    only_plain(workload.network)
    if workload.dtype not in (None, subject.dtype):
        raise NotOfferedError(f"it is measured in {subject.dtype}")
    call = _program(subject, workload, measure, data)
    if DEVICE == "cuda":
        call = partial(_with_tf32, subject.tf32, call)
    result = call()
    check_device(result)
    wait = check_device if DEVICE == "cuda" else None
    return Prepared(call, wait, lambda: _arrays(workload, measure, result), {})


def _program(subject, workload, measure, data):
    """What a measure calls."""
    dtype, phi = getattr(torch, subject.dtype), workload.network.activation

    def tensor(array):
        return torch.as_tensor(array, device=DEVICE).to(dtype)

    def layer(U, W, b):
        made = torch.nn.RNN(*U.shape[::-1], nonlinearity=phi, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            # Of the second bias, which is torch's alone, the gradient is the first's.
            values = [tensor(array) for array in (U, W, b, 0 * b)]
            for parameter, value in zip(made.parameters(), values, strict=True):
                parameter.copy_(value)
        # cuDNN in training mode keeps what a backward needs.
        return made.train(measure != FORWARD)

    # torch.func.vmap has no rule for rnn_tanh (torch 2.13), so members are a loop.
    members = zip(*data.cells[0], strict=True) if workload.members else data.cells
    layers = [layer(*member) for member in members]
    parameters = [parameter for each in layers for parameter in each.parameters()]
    g, xs = tensor(data.g), tensor(data.xs)
    if workload.ids:
        xs = torch.as_tensor(data.ids, device=DEVICE).long()

    def inputs():
        return torch.nn.functional.one_hot(xs, workload.D).to(dtype) if workload.ids else xs

    def loss(xs):
        return sum((layer(xs)[0] * g).sum() for layer in layers)

    def forward():
        with torch.inference_mode():
            xs = inputs()
            return [layer(xs)[0] for layer in layers]

    def backward():
        if workload.ids:
            return torch.autograd.grad(loss(inputs()), parameters)
        xs = inputs().detach().requires_grad_()
        return torch.autograd.grad(loss(xs), [*parameters, xs])

    return {FORWARD: forward, BACKWARD: backward}[measure]


def _arrays(workload: Workload, measure: str, result: Any) -> dict[str, np.ndarray]:
    """A result as float64 arrays in Data's layout, by the reference's names."""

    def array(tensor):
        return tensor.detach().double().cpu().numpy()

    few, result, found = workload.compared, list(result), {}
    if measure == FORWARD:
        parts = {"hs": [hs[:, few] for hs in result]}
    else:
        if len(result) % 4:
            found["dxs"] = array(result.pop()[:, few])
        # Four parameters a layer.
        parts = {name: result[n::4] for n, name in enumerate(parameter_names(1))}
    for name, members in parts.items():
        stacked = np.stack([array(member) for member in members])
        found[name] = stacked if workload.members else stacked[0]
    return found


def _with_tf32(on, call):
    # Subjects run in turn in one process, and these are the process's settings.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "rnn") and hasattr(cudnn.rnn, "fp32_precision"):
        matmul.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if on else "ieee"
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = on
    return call()
