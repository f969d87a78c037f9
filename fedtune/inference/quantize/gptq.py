"""GPTQ: rounds a linear's columns one by one, and adjusts the remaining columns to compensate each error.

With H = X Xᵀ of the inputs and U the upper Cholesky factor of H⁻¹, rounding column i by e = (w_i − q_i) / U_ii moves the later columns by
−e U_i,i+1... If H is diagonal, no column moves, and the result is round-to-nearest.

Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323, algorithm 1 (lazy blocks and Cholesky: §3.3), groups as in its §5 ("grouping").
"""

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.quantize.rtn import GROUP, Grid, Kind, fit_grid

__all__ = ["quantize_gptq"]


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    kind: Kind,
    group: int = GROUP,
    *,
    damp: float = 0.01,
    block: int = 128,
    factor: Tensor | None = None,
) -> tuple[Grid, Tensor]:
    """Return grid and codes [N, K] of a weight [N, K], given the second moments of its inputs.

    A group's grid is fitted when its first column is reached, to the weights adjusted by then.

    Args:
        hessian: XᵀX / n of the inputs X [n, K]: [K, K], symmetric.

    Other arguments:
        damp: Share of the mean of H's diagonal that is added to it (1 % as in the paper); ten times more while H is singular.
        factor: Result of `inverse_factor`, for weights that share their inputs.
        block: Columns whose errors are applied to later columns in one product; affects only the run time.

    Raises:
        ModelError: The Hessian has the wrong shape or is not finite, or as in `fit_grid`.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ModelError(f"a weight of {columns} columns needs a Hessian of shape {(columns, columns)}, not {tuple(hessian.shape)}")
    factor = inverse_factor(hessian, damp) if factor is None else factor
    weight = weight.to(torch.float32, copy=True)
    width = group or columns
    grid = fit_grid(weight, kind, group)  # final if a row is one group
    codes = torch.empty(rows, columns)
    block = max(block // width, 1) * width if width < columns else block
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(rows, end - start)
        for i in range(start, end):
            if width < columns and i % width == 0:
                fresh = fit_grid(weight[:, i : min(i + width, columns)], kind, group)
                grid.scale[:, i // width], grid.zero[:, i // width] = fresh.scale[:, 0], fresh.zero[:, 0]
            column = weight[:, i : i + 1]
            codes[:, i : i + 1] = grid.codes(column, i)
            error = (column - grid.values(codes[:, i : i + 1], i)) / factor[i, i]
            weight[:, i + 1 : end] -= error * factor[i, i + 1 : end]
            errors[:, i - start : i - start + 1] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return grid, codes


def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """Upper triangular U with UᵀU = (H + damp · mean(diag H) · I)⁻¹, [K, K]."""
    mean = float(hessian.diagonal().mean())
    if not mean >= 0 or mean == float("inf"):
        raise ModelError("the calibration text gave activations that are not finite: check the model, or quantize with method=rtn")
    for more in (1, 10, 100):
        damped = hessian.float().clone()
        damped.diagonal().add_(damp * more * mean or 1.0)  # all inputs are zero: any diagonal gives round-to-nearest
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # for a wide layer, each of these is larger than its weights
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not failed:
                return upper
    raise ModelError("the Hessian of a layer's inputs cannot be inverted: calibrate with more text, or use method=awq or rtn")
