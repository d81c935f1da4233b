"""Float64 references: the papers' formulas for one matrix g in R^{m x n}, with loops and SVD. Imports torch only."""

import math

import torch


def f64(x):
    return x.detach().to("cpu", torch.float64).clone()


def row_l2(g):
    """Q(g)^{-1} g sqrt(n) (arXiv 2502.06742): every row norm becomes sqrt(n), a zero row stays zero."""
    x = f64(g)
    for row in x:
        norm = row.norm()
        row.mul_(math.sqrt(row.numel()) / norm if norm > 0 else 0.0)
    return x


def col_l2(g):
    return row_l2(g.mT).mT


def row_standardize(g):
    """GradNorm of SWAN (arXiv 2412.13148): minus the row's mean, over its biased (1/n) standard deviation."""
    x = f64(g)
    for row in x:
        row.sub_(row.mean())
    return row_l2(x)


def frobenius(g):
    x = f64(g)
    norm = x.norm()
    return x * (math.sqrt(x.numel()) / norm if norm > 0 else 0.0)


def sign(g):
    return f64(g).sign()


def newton_schulz(g, steps=10, beta=0.8):
    """GradWhitening: coupled iteration on the smaller side of g / ||g||_F; both lines use the same old Z Y."""
    if g.shape[0] > g.shape[1]:
        return newton_schulz(g.mT, steps, beta).mT
    x = frobenius(g) / math.sqrt(g.numel())
    y, z = x @ x.mT, torch.eye(len(x), dtype=torch.float64)
    for _ in range(steps):
        bracket = 3 * torch.eye(len(x), dtype=torch.float64) - z @ y
        y, z = beta * y @ bracket, beta * bracket @ z
    return z @ x


def nsds(g, steps=2, beta=0.4):
    """The same with diagonal substitution: Z Y becomes Diag(Z) Diag(Y) in the first line, Diag(Z) Y in the second."""
    if g.shape[0] > g.shape[1]:
        return nsds(g.mT, steps, beta).mT
    x = frobenius(g) / math.sqrt(g.numel())
    eye = torch.eye(len(x), dtype=torch.float64)
    y, z = x @ x.mT, eye
    for _ in range(steps):
        dy, dz = torch.diag(y.diag()), torch.diag(z.diag())
        y, z = beta * y @ (3 * eye - dz @ dy), beta * (3 * eye - dz @ y) @ dz
    return z @ x


def polar(g, rtol=1e-6):
    """U V^T over the singular values above rtol times the largest one."""
    u, s, vh = torch.linalg.svd(f64(g), full_matrices=False)
    keep = s > rtol * s.max()
    return u[:, keep] @ vh[keep]


# Minimax quintics for singular values in [1e-3, 1], arXiv 2505.16932, Algorithm 1.
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def polar_express(g, steps=5):
    """Polar Express as a polynomial of the singular values, with margins of 1.01 before the first and in each step."""
    u, s, v = torch.linalg.svd(f64(g), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp_min(1e-300) / 1.01
    for a, b, c in QUINTICS[:steps]:
        s = s / 1.01
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def swan(g, center=True):
    return frobenius(polar_express(row_standardize(g) if center else row_l2(g)))


def swan_of_the_paper(g, steps=10, beta=0.8, center=True):
    return frobenius(newton_schulz(row_standardize(g) if center else row_l2(g), steps, beta))


def multi_normalize(g, projections=(row_l2, col_l2), iterations=5):
    """MultiNorm (arXiv 2502.06742, Algorithm 1); the defaults are SR-Sinkhorn (Algorithm 3)."""
    x = f64(g)
    for _ in range(iterations):
        for project in projections:
            x = project(x)
    return x


def sinkhorn_momentum(grad, momentum, mu=0.95, half_steps=11, tau=1e-3, gamma=0.18):
    """DeepSeek's rule for embeddings: (delta, new momentum); balances the Nesterov momentum, rows first and last."""
    momentum = mu * f64(momentum) + f64(grad)
    u = mu * momentum + f64(grad)
    norms = u.norm(dim=1)
    u[norms <= tau * norms.mean()] = 0.0
    for half_step in range(half_steps):
        u = row_l2(u) / math.sqrt(u.shape[1]) if half_step % 2 == 0 else col_l2(u) / math.sqrt(u.shape[0])
    return gamma * math.sqrt(u.shape[1]) * u, momentum


def adamw(w, g, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """One AdamW step, the first being step=1: (w, m, v) after it."""
    w, g = f64(w) * (1 - lr * weight_decay), f64(g)
    m = betas[0] * f64(m) + (1 - betas[0]) * g
    v = betas[1] * f64(v) + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v
