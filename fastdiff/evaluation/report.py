"""The printed form of an evaluation."""

from typing import Any


def format_report(report: dict[str, Any]) -> str:
    """A table of what ``evaluate`` returned, for a terminal."""
    real, samples = report["real"], report["samples"]
    shape = "x".join(map(str, samples["shape"]))
    of = "" if real["count"] == real["total"] else f" (of {real['total']:,}, drawn at random)"
    lines = [f"{samples['count']:,} samples of {shape} against {real['count']:,} real images{of}"]
    lines += _classifier_lines(report)
    lines += ["", f"{'':30}{'samples':>12}{'real':>12}{'noise':>12}"]
    if report["confidence"]:
        lines.append(_row("mean confidence", report["confidence"], "real"))
    lines.append(_row("Fréchet distance", report["frechet"], "halves"))
    nearest = {name: report["nearest"][name]["mean"] for name in ("samples", "real", "noise")}
    lines.append(_row("distance to nearest real image", nearest, "real"))
    return "\n".join(lines + [""] + _notes(report))


def _classifier_lines(report: dict[str, Any]) -> list[str]:
    judge = report["classifier"]
    if judge is None:
        return [f"no classifier: {report['no_classifier']}"]
    lines = [
        f"classifier: {judge['members']} networks trained on {judge['trained_on']:,} real images, "
        f"accuracy {judge['held_out_accuracy']:.4f} on {judge['held_out']:,} held out"
    ]
    if judge["held_out_accuracy"] < 0.9:
        lines.append("  (below 0.9: read confidence and class shares with care)")
    return lines


def _row(title: str, values: dict[str, float], real: str) -> str:
    cells = "".join(f"{values[name]:12.4g}" for name in ("samples", real, "noise"))
    return f"{title:30}{cells}"


def _notes(report: dict[str, Any]) -> list[str]:
    frechet, nearest, classes = report["frechet"], report["nearest"], report["classes"]
    ratio = "" if frechet["ratio"] is None else f"; samples / real halves {frechet['ratio']:.2f}"
    lines = [
        f"Fréchet: {frechet['count']:,} against {frechet['count']:,} images on "
        f"{frechet['features']} features, mean of {frechet['draws']} draws (std: samples "
        f"{frechet['samples_std']:.2g}, real {frechet['halves_std']:.2g}){ratio}",
        f"nearest: {nearest['closer_than_real']:.1%} of samples are nearer than all but 1 % of "
        f"real images are to each other; exact copies {nearest['copies']}",
    ]
    if classes:
        shares = "  ".join(f"{name} {share:.1%}" for name, share in classes["shares"].items())
        absent = ", ".join(classes["absent"]) or "none"
        lines.append(f"classes: {shares}")
        lines.append(f"largest share {classes['max_share']:.1%}; absent: {absent}")
    if report["label_agreement"] is not None:
        lines.append(f"recognised as the label asked for: {report['label_agreement']:.1%}")
    return lines
