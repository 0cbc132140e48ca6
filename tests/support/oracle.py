"""An independent float64 computation of every loss and its gradient, one list at a time, each position by itself."""

import numpy as np


def nll(scores, reference, decay=None, top_k=None):
    """Plackett-Luce loss of one list and its gradient (n,), by the definition, in float64."""
    scores, reference = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    n = len(scores)
    order = np.argsort(-reference, kind="stable")
    s, loss, grad = scores[order], 0.0, np.zeros(n)
    placed = n if top_k is None else min(top_k, n)
    for k in np.split(np.arange(placed), range(256, placed, 256)):  # positions; not all at once, for the memory
        weight = np.ones(len(k)) if decay is None else 1 / np.log(k + 2)
        later = np.where(np.arange(n) > k[:, None], s, -np.inf)
        top = np.maximum(later.max(1, initial=-np.inf), s[k])
        mass, own = np.exp(later - top[:, None]), np.exp(s[k] - top)
        rest = mass.sum(1)
        total = rest + own
        # log1p and the mass of the others, so that float64 too keeps what is nearly zero.
        loss += weight @ np.where(s[k] == top, np.log1p(rest), np.log(total) + top - s[k])
        grad[order] += weight / total @ mass
        grad[order[k]] -= weight * rest / total
    return loss, grad


def _rows(a, b, **options):
    results = [nll(x, y, **options) for x, y in zip(a, b, strict=True)]
    return sum(r[0] for r in results), np.stack([r[1] for r in results])


def terms(img, txt, scale, *, decay=None, top_k=None, keep_self=True):
    """{term: (value, d_img, d_txt, d_scale)} in float64 for clip, in_modal and cross_modal."""
    img, txt = np.asarray(img, np.float64), np.asarray(txt, np.float64)
    b = len(img)

    def pull_back(value, *pairs):
        d = {"i": np.zeros_like(img), "t": np.zeros_like(txt)}
        z = {"i": img, "t": txt}
        d_scale = 0.0
        for grad, (left, right) in pairs:
            d[left] += scale * grad @ z[right]
            d[right] += scale * grad.T @ z[left]
            d_scale += (grad * (z[left] @ z[right].T)).sum()
        return value, d["i"], d["t"], d_scale

    def consistency(a, b_, names, mask=None):
        n = a.shape[1] if mask is None else a.shape[1] - 1
        kept = max(1, n if top_k is None else min(top_k, n))
        options = dict(decay=decay, top_k=top_k)
        norm = 2 * b * kept
        values, grads = [], []
        for x, y in ((a, b_), (b_, a)):
            if mask is None:
                value, grad = _rows(x, y, **options)
            else:
                value, inner = _rows(x[mask].reshape(b, -1), y[mask].reshape(b, -1), **options)
                grad = np.zeros_like(x)
                grad[mask] = inner.ravel()
            values.append(value)
            grads.append(grad / norm)
        return pull_back(sum(values) / norm, *zip(grads, names, strict=True))

    def cross_entropy(logits):
        top = logits.max(1, keepdims=True)
        p = np.exp(logits - top)
        value = (np.log(p.sum(1)) + top[:, 0] - np.diag(logits)).mean()
        return value, (p / p.sum(1, keepdims=True) - np.eye(b)) / b

    it = scale * img @ txt.T
    mask = None if keep_self else ~np.eye(b, dtype=bool)
    (l_it, g_it), (l_ti, g_ti) = cross_entropy(it), cross_entropy(it.T)
    return {
        "clip": pull_back((l_it + l_ti) / 2, (g_it / 2, "it"), (g_ti / 2, "ti")),
        "in_modal": consistency(scale * img @ img.T, scale * txt @ txt.T, ("ii", "tt"), mask),
        "cross_modal": consistency(it, it.T, ("it", "ti")),
    }


def relative(got, want):
    """Error of an array relative to the norm of what it should be; absolute below the smallest float32."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def unit_rows(rng, rows, width, towards=None, share=0.0):
    """(rows, width) float32 unit vectors, mixed with those of `towards` by `share`."""
    z = rng.normal(size=(rows, width))
    if towards is not None:
        z = share * towards * np.sqrt(width) + (1 - share) * z
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
