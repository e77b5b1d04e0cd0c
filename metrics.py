"""
Measures of pictures. Pure functions of features: arrays in, figures with standard errors out.

    frechet_distance     FID, sFID: distance of two Gaussians fitted to features (arXiv 1706.08500, 2103.03841)
    precision_recall     how many samples look like references, and the reverse (arXiv 1904.06991)
    inception_score      IS (arXiv 1606.03498)
    class_distance       variety inside a class
    compare              policies with their base, paired by picture

evaluate.py chooses the features and the pictures. Shapes: n pictures, m references, E features each.
"""

from typing import NamedTuple

import numpy as np
import torch


class Figure(NamedTuple):
    """
    A figure with its influence function (K,): how much each of K units, mostly pictures, moves it, times K, to first
    order. Its spread gives the standard error; the spread of the difference of two policies' influences, the standard
    error of their difference. A bootstrap agrees, at a higher cost.
    """

    value: float
    influence: np.ndarray

    @property
    def error(self):
        """Standard error; NaN for a single unit."""
        K = len(self.influence)
        return float(self.influence.std(ddof=1) / K**0.5) if K > 1 else np.nan


def mean_of(values, groups=None):
    """Mean of the finite values among values (K,). With groups (K,), the mean of the groups' own means."""
    groups = np.zeros(len(values)) if groups is None else groups
    means, influence, names = [], np.zeros(len(values)), np.unique(groups)
    for name in names:
        own = (groups == name) & np.isfinite(values)
        means.append(values[own].mean())
        influence[own] = (values[own] - means[-1]) * len(values) / (len(names) * own.sum())
    return Figure(float(np.mean(means)), influence)


def compare(runs, base=None, paired=True):
    """
    {metric: (mean over runs, standard error or None)} of runs, a list of {metric: Figure or reason}, minus `base` where
    it is given, for the metrics that all have. The error of several runs includes their spread. Paired: unit k of all
    had the same prompt and random numbers, so what they share cancels.
    """
    found = {}
    for metric in runs[0]:
        figures = [one.get(metric) for one in (*runs, *([base] if base else []))]
        if not all(isinstance(figure, Figure) for figure in figures):
            continue
        own = figures[: len(runs)]
        value, influence = np.mean([f.value for f in own]), np.mean([f.influence for f in own], axis=0)
        variance = np.var([f.value for f in own], ddof=1) / len(own) if len(own) > 1 else 0.0
        if base:
            value -= figures[-1].value
        if base and paired:
            influence = influence - figures[-1].influence
        elif base:
            variance += figures[-1].error ** 2
        error = float((Figure(0, influence).error ** 2 + variance) ** 0.5)
        found[metric] = float(value), error if np.isfinite(error) else None
    return found


def gaussian(features):
    """Mean (E,) and covariance (E, E) of features (n, E), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(features, mu, cov):
    """
    |m - mu|^2 + tr(C + cov - 2 (cov^1/2 C cov^1/2)^1/2): the distance from the Gaussian fitted to features (n, E) to
    the one of mean mu (E,) and covariance cov (E, E), in float64 (arXiv 1706.08500). Few pictures bias it upwards, and
    the standard error does not show that.
    """
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean  # (n, E) float64, the largest thing here: 0.8 GB for 50,000 x 2,048
    own = centred.T @ centred / (len(features) - 1)
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * values.clip(0) ** 0.5) @ vectors.T
    values, vectors = np.linalg.eigh(root @ own @ root)
    values = values.clip(0)  # below 0 is rounding
    distance = ((mean - mu) ** 2).sum() + np.trace(own) + np.trace(cov) - 2 * (values**0.5).sum()
    # d distance / d C = 1 - cov^1/2 (cov^1/2 C cov^1/2)^-1/2 cov^1/2
    side = root @ vectors
    inverse = np.where(values > 1e-12 * values[-1], values, np.inf) ** -0.5
    slope = np.eye(len(mu)) - (side * inverse) @ side.T
    influence = 2 * centred @ (mean - mu) + np.einsum("ne,ne->n", centred @ slope, centred)
    return Figure(float(distance), influence - influence.mean())


def precision_recall(samples, references, k=3, rows=512):
    """
    Improved precision and recall (arXiv 1904.06991, eq. 1-2) of features samples (n, E) and references (m, E).

    Around each reference lies a ball that reaches to its k-th nearest other reference. Precision is the share of
    samples in at least one of these balls. Recall exchanges the roles: the share of references in a ball around a
    sample; its units, for the standard error, are the references. Blocks of `rows` rows bound the memory.
    """
    samples, references = torch.as_tensor(samples), torch.as_tensor(references)
    reach, reach_of_references = (
        torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, k] for part in x.split(rows)])
        for x in (samples, references)  # k + 1: the nearest is itself
    )
    precise, recalled = [], torch.zeros(len(references), dtype=torch.bool)
    for part, radius in zip(samples.split(rows), reach.split(rows), strict=True):
        across = torch.cdist(part, references)  # (rows, m)
        precise.append((across <= reach_of_references[None]).any(1))
        recalled |= (across <= radius[:, None]).any(0)
    return mean_of(torch.cat(precise).double().numpy()), mean_of(recalled.double().numpy())


def inception_score(logits, chunk=5000):
    """
    exp of the mean over pictures of KL(p(class | picture) to its mean), of logits (n, classes), then the mean over
    chunks of pictures in their order (arXiv 1606.03498). ADM: 1,008 logits without bias, chunks of 5,000.
    """
    scores, influence = [], []
    for part in torch.as_tensor(logits).split(chunk):
        logp = part.double().log_softmax(1)
        kl = (logp.exp() * (logp - logp.exp().mean(0).log())).sum(1).numpy()
        scores.append(np.exp(kl.mean()))
        influence.append(scores[-1] * (kl - kl.mean()) / len(part))
    return Figure(float(np.mean(scores)), np.concatenate(influence) * len(logits) / len(scores))


def class_distance(features, prompts):
    """
    Mean distance between the features (n, E) of two pictures of one class or prompt, then over the classes of two
    pictures or more: how much variety is left. prompts: n labels or captions. None if there is no such class. Its
    units, for the standard error, are the classes.
    """
    labels = np.unique(np.asarray(prompts), return_inverse=True)[1]
    classes = [features[labels == k] for k in np.flatnonzero(np.bincount(labels) > 1)]
    means = [torch.pdist(torch.as_tensor(own)).double().mean().item() for own in classes]
    return mean_of(np.array(means)) if means else None


# ---------------------------------------------------------------------------------------------------------------
# Which figures are computed. Where there are too few pictures for one, a text in its place says so.

FEWEST = 48  # pictures, below which precision and recall mean nothing


class Reference(NamedTuple):
    features: np.ndarray  # (m, E)
    gaussian: tuple  # mean (E,) and covariance (E, E); None: too few pictures


def reference_of(features, known=None):
    """`known`: mean and covariance, where they are of more pictures than `features` are."""
    if known:
        return Reference(features, tuple(np.asarray(x, np.float64) for x in known))
    return Reference(features, gaussian(features) if len(features) > features.shape[1] else None)


def too_few(n, m, least, why=""):
    """None, or why a figure that takes `least` pictures and references is blank with n and m of them."""
    have = f"{n:,} pictures" if n < least else f"{m:,} references"
    return f"{least:,} are needed{why}, there are {have}" if min(n, m) < least else None


def frechet(features, reference):
    """The Frechet distance of features (n, E), or why there is none: a covariance needs more pictures than features."""
    (n, width), m = features.shape, len(reference.features) if reference.gaussian is None else np.inf
    few = too_few(n, m, width + 1, f", one more than features ({width:,})")
    return few or frechet_distance(features, *reference.gaussian)


def neighbours(features, reference):
    """(precision, recall) of features (n, E), or twice why there are none."""
    few = too_few(len(features), len(reference.features), FEWEST)
    return (few, few) if few else precision_recall(features, reference.features)


def feature_figures(found, references):
    """
    {name of metric: figure or reason} of the prompts (n,) and the features in `found`: for a toy those of CLIP and of
    the tokenizer's encoder; Inception's as ADM does (arXiv 2105.05233), with the distance in class beside.
    """
    figures, alone = {}, "no class or prompt has two pictures"
    for name in [name for name in ("CLIP", "latents") if name in found]:
        figures[f"Frechet, {name}"] = frechet(found[name], references[name])
        figures[f"precision, {name}"], figures[f"recall, {name}"] = neighbours(found[name], references[name])
        figures[f"distance in class, {name}"] = class_distance(found[name], found["prompts"]) or alone
    if "pool" in references:
        figures["FID"] = frechet(found["pool"], references["pool"])
        figures["sFID"] = frechet(found["spatial"], references["spatial"])
        figures["precision"], figures["recall"] = neighbours(found["pool"], references["pool"])
    if "pool" in found:
        few = too_few(len(found["pool"]), np.inf, 5000, ", one chunk")
        figures["IS"] = few or inception_score(found["logits"])
        figures["distance in class"] = class_distance(found["pool"], found["prompts"]) or alone
    return figures


# ---------------------------------------------------------------------------------------------------------------
# A table of them


def as_cells(figures, sign=""):
    """{metric: text} of {metric: (value, standard error)}, with two digits of the error and as many of the value."""
    cells = {}
    for metric, (value, error) in figures.items():
        percent = metric.startswith(("right", "missing"))
        digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 6)) if error else 3
        cells[metric] = f"{value:{sign}.1%}" if percent else f"{value:{sign}.{digits}f}"
        if error is not None:
            cells[metric] += f" ± {100 * error:.1f}" if percent else f" ± {error:.{digits}f}"
    return cells


def as_table(columns):
    """A Markdown table of {column: {metric: text}}; a metric that a column lacks is left blank."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric in dict.fromkeys(metric for cells in columns.values() for metric in cells):
        lines.append(f"| {metric} | " + " | ".join(cells.get(metric, "") for cells in columns.values()) + " |")
    return "\n".join(lines)
