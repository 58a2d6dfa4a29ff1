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
