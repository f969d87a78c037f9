"""GPTQ: round a linear's columns one after another, and let those still to come make up for each one's error.

With H = X Xᵀ of the inputs and U the upper Cholesky factor of H⁻¹, rounding column i by e = (w_i − q_i) / U_ii moves the later columns by
−e U_i,i+1... Where H is diagonal there is nothing to move, and what comes out is round-to-nearest.

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
    """Grid and codes [N, K] of a weight [N, K], given how its inputs vary together.

    A group's grid is fitted when its first column is reached, to weights that have made up for the errors before it.

    Args:
        hessian: XᵀX / n of the inputs X [n, K]: [K, K], symmetric.

    Other arguments:
        damp: Share of the mean of H's diagonal that is added to it (the paper's 1 %); ten times more where H stays singular.
        factor: Of `inverse_factor`, where several weights share their inputs.
        block: Columns whose errors reach the columns beyond them in one product; it changes nothing but the time.

    Raises:
        ModelError: The Hessian does not fit or is not finite, or as `fit_grid`.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ModelError(f"a weight of {columns} columns needs a Hessian of as many rows and columns, not {tuple(hessian.shape)}")
    factor = inverse_factor(hessian, damp) if factor is None else factor
    weight = weight.to(torch.float32, copy=True)
    width = group or columns
    grid = fit_grid(weight, kind, group)  # of a row that is one group it is the final one
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
        damped.diagonal().add_(damp * more * mean or 1.0)  # no input at all: any diagonal gives round-to-nearest
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # of a wide layer each of these is larger than its weights
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not failed:
                return upper
    raise ModelError("the inputs of a layer vary too little to invert their Hessian: calibrate with more text, or use method=awq or rtn")
