"""The source's section 3 in float64 NumPy loops: the double sum, with its signs mended.

It imports nothing from jaxrnn and uses no matrix identity beyond the printed ones: for each
pair k ≤ t the product of Jacobians is multiplied out.
"""

import numpy as np


def softmax(omega):
    e = np.exp(omega - omega.max())
    return e / e.sum()


def states(U, W, b, xs, h0):
    hs = [h0]
    for x in xs:
        hs.append(np.tanh(U @ x + W @ hs[-1] + b))
    return hs  # hs[0] is h_0


def loss_and_grads(U, W, b, V, c, xs, ys, h0):
    """One sequence: xs [T, D], one-hot ys [T, K]. Returns the loss and a dict of gradients."""
    hs = states(U, W, b, xs, h0)
    T, H = len(xs), len(b)
    loss = 0.0
    d = {name: np.zeros_like(value) for name, value in
         dict(U=U, W=W, b=b, V=V, c=c, xs=xs, h0=h0).items()}  # fmt: skip
    for t in range(1, T + 1):
        y_hat = softmax(V @ hs[t] + c)
        loss -= ys[t - 1] @ np.log(y_hat)
        error = y_hat - ys[t - 1]
        d["V"] += np.outer(error, hs[t])
        d["c"] += error
        for k in range(1, t + 1):
            row = error @ V
            for j in range(t - 1, k - 1, -1):
                row = row @ (np.diag(1 - hs[j + 1] ** 2) @ W)
            for i in range(H):
                # The immediate derivative of h_{k,i}, with h_{k−1} held fixed.
                dh = row[i] * (1 - hs[k][i] ** 2)
                d["U"][i] += dh * xs[k - 1]
                d["W"][i] += dh * hs[k - 1]
                d["b"][i] += dh
                d["xs"][k - 1] += dh * U[i]
                if k == 1:
                    d["h0"] += dh * W[i]
    return loss, d


def batch_loss_and_grads(U, W, b, V, c, xs, ys, h0):
    """A batch, xs [T, B, D]: sequence by sequence."""
    total, sums = 0.0, None
    for n in range(xs.shape[1]):
        loss, d = loss_and_grads(U, W, b, V, c, xs[:, n], ys[:, n], h0[n])
        total += loss
        if sums is None:
            sums = {**d, "xs": np.zeros_like(xs), "h0": np.zeros_like(h0)}
            for name in "UWbVc":
                sums[name] = np.zeros_like(d[name])
        for name in "UWbVc":
            sums[name] += d[name]
        sums["xs"][:, n], sums["h0"][n] = d["xs"], d["h0"]
    return total, sums


# Two forms, a leak and options ----------------------------------------------------------------

ACTIVATIONS = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(a.dtype)),
    "identity": (lambda a: a, np.ones_like),
}


def output(form, activation, h):
    return ACTIVATIONS[activation][0](h) if form == "voltage" else h


def states_of_form(form, activation, cell, xs, h0, drive):
    """One sequence of valid steps: a_1 … a_T, and h_0 … h_T. cell: a dict of U, W, b, leak."""
    phi, _ = ACTIVATIONS[activation]
    U, W = cell["U"], cell["W"]
    b = 0 if cell["b"] is None else cell["b"]
    alpha = np.broadcast_to(1.0 if cell["leak"] is None else cell["leak"], h0.shape)
    currents, hs = [], [h0]
    for x, d in zip(xs, drive, strict=True):
        h = hs[-1]
        if form == "rate":
            a = W @ h + U @ x + b + d
            new = (1 - alpha) * h + alpha * phi(a)
        else:
            a = W @ phi(h) + U @ x + b + d
            new = (1 - alpha) * h + alpha * a
        currents.append(a)
        hs.append(new)
    return currents, hs


def gradients_of_form(form, activation, cell, xs, h0, drive, dhs, dh_last, truncate, window):
    """One sequence of valid steps, dhs [T, H] and dh_last [H]: the double sum, as a dict.

    For each pair k ≤ t the product of Jacobians J_t … J_{k+1} is multiplied out; k = 0 is h_0.
    """
    phi, slope = ACTIVATIONS[activation]
    currents, hs = states_of_form(form, activation, cell, xs, h0, drive)
    U, W, leak = cell["U"], cell["W"], cell["leak"]
    T, H = len(xs), len(h0)
    alpha = np.broadcast_to(1.0 if leak is None else leak, (H,))
    p, s, toward, J = [None], [None], [None], [None]
    for t in range(1, T + 1):
        a, h = currents[t - 1], hs[t - 1]
        p.append(alpha * slope(a) if form == "rate" else alpha)
        s.append(h if form == "rate" else phi(h))  # What W is multiplied with in step t.
        toward.append((phi(a) if form == "rate" else a) - h)  # ∂h_t/∂α
        q = np.ones(H) if form == "rate" else slope(h)
        if truncate is not None and t > 1 and (t - 1) % truncate == 0:
            q = np.zeros(H)
        J.append(np.diag(p[t]) @ W @ np.diag(q) + np.diag(1 - alpha))
    like = dict(U=U, W=W, b=h0, xs=xs, h0=h0, delta=drive, adjoint=drive)
    d = {name: np.zeros_like(value) for name, value in like.items()}
    d_alpha = np.zeros(H)
    for t in range(T + 1):
        for k in range(t + 1):
            if window is not None and t - k >= window:
                continue
            row = (dhs[t - 1] if t else np.zeros(H)) + (dh_last if t == T else 0)
            for j in range(t, k, -1):
                row = row @ J[j]
            if k == 0:
                d["h0"] += row
                continue
            delta = row * p[k]
            d["adjoint"][k - 1] += row
            d["delta"][k - 1] += delta
            d["U"] += np.outer(delta, xs[k - 1])
            d["W"] += np.outer(delta, s[k])
            d["b"] += delta
            d["xs"][k - 1] += U.T @ delta
            d_alpha += row * toward[k]
    d["b"] = None if cell["b"] is None else d["b"]
    d["leak"] = None if leak is None else d_alpha if np.ndim(leak) else d_alpha.sum()
    return d


def _sequences(valid, reverse):
    """(n, the valid steps of sequence n in the order in which they are read)."""
    for n in range(valid.shape[1]):
        steps = np.flatnonzero(valid[:, n])
        yield n, steps[::-1] if reverse else steps


def batch_states_of_form(form, activation, cell, xs, h0, drive, valid, reverse=False):
    """xs [T, B, D], valid [T, B]: h_last [B, H] and hs [T, B, H], 0 on invalid steps."""
    h_last, hs = np.array(h0), np.zeros_like(drive)
    for n, steps in _sequences(valid, reverse):
        _, found = states_of_form(form, activation, cell, xs[steps, n], h0[n], drive[steps, n])
        h_last[n] = found[-1]
        for t, h in zip(steps, found[1:], strict=True):
            hs[t, n] = h
    return h_last, hs


def batch_gradients_of_form(
    form, activation, cell, xs, h0, drive, valid, dhs, dh_last, *,
    reverse=False, truncate=None, window=None,
):  # fmt: skip
    """A batch, sequence by sequence: gradients of the cell summed, of the rest each its own."""
    sums = {name: None if value is None else np.zeros_like(value) for name, value in cell.items()}
    d = dict(xs=np.zeros_like(xs), h0=np.zeros_like(h0))
    d |= dict(delta=np.zeros_like(drive), adjoint=np.zeros_like(drive))
    for n, steps in _sequences(valid, reverse):
        one = gradients_of_form(
            form, activation, cell, xs[steps, n], h0[n], drive[steps, n], dhs[steps, n],
            dh_last[n], truncate, window,
        )  # fmt: skip
        for name, value in sums.items():
            if value is not None:
                sums[name] = value + one[name]
        d["h0"][n] = one["h0"]
        for name in ("xs", "delta", "adjoint"):
            d[name][steps, n] = one[name]
    return sums, d


def batch_loss_and_grads_of_form(
    form, activation, cell, V, c, xs, ys, h0, drive, valid, **options
):  # fmt: skip
    """The summed cross-entropy of a readout of g(h): (loss, cell's sums, the rest, dV, dc)."""
    _, slope = ACTIVATIONS[activation]
    reverse = options.get("reverse", False)
    _, hs = batch_states_of_form(form, activation, cell, xs, h0, drive, valid, reverse)
    loss, dV, dc, dhs = 0.0, np.zeros_like(V), np.zeros_like(c), np.zeros_like(hs)
    for t, n in np.argwhere(valid):
        s = output(form, activation, hs[t, n])
        y_hat = softmax(V @ s + c)
        loss -= ys[t, n] @ np.log(y_hat)
        error = y_hat - ys[t, n]
        dV += np.outer(error, s)
        dc += error
        dhs[t, n] = (V.T @ error) * (slope(hs[t, n]) if form == "voltage" else 1)
    sums, d = batch_gradients_of_form(
        form, activation, cell, xs, h0, drive, valid, dhs, np.zeros_like(h0), **options
    )
    return loss, sums, d, dV, dc
