"""Describe the rows of benchmarks.swap: their settings, their ratios, and their display."""

from typing import Any, NamedTuple

from benchmarks import networks

DIRECTIONS = ("training", "inference")

Row = dict[str, Any]


class Setting(NamedTuple):
    """Hold a network's run settings."""

    mode: str = "eager"
    precision: str = "fp32"
    channels_last: bool = True

    @property
    def name(self) -> str:
        """Describe the setting in words."""
        mode = {"compile": "torch.compile"}.get(self.mode, self.mode)
        return f"{mode}, {self.precision}, channels {'last' if self.channels_last else 'first'}"


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row["mode"], row["precision"], row["channels_last"])


def of_first_setting(result: dict[str, Any]) -> list[Row]:
    """Select the rows at a result's first setting, used for its pictures and table."""
    return [row for row in result["rows"] if setting_of(row) == setting_of(result["rows"][0])]


def title(row: Row) -> str:
    """Return a row's name within its table."""
    return row["variant"] + (", fused" if row["fused"] else "")


def named(row: Row) -> str:
    """Name the variant for readers: "own, mean, 14" is "ContextEncoding (C/16), max_size 14"."""
    width, _, rest = row["variant"].partition(", mean")
    if width not in ("own", "1/4"):
        return row["variant"]
    return f"ContextEncoding ({row['reduction']}){rest.replace(', ', ', max_size ')}"


def peak_of(row: Row) -> str:
    """Return the memory for comparing rows: of training, or of inference for fused ones, which are not trained."""
    return "inference_peak_bytes" if row["fused"] else "training_peak_bytes"


def add_ratios(rows: list[Row]) -> None:
    """Add the ratios of the rows to the first row."""
    base = rows[0]
    for row in rows:
        row["compared_with"] = base["variant"]
        for direction in DIRECTIONS:
            if f"{direction}_ms" in row and f"{direction}_ms" in base:
                row[f"{direction}_ratio"] = row[f"{direction}_ms"]["median"] / base[f"{direction}_ms"]["median"]
        if peak_of(row) in row and peak_of(row) in base:
            row["memory_ratio"] = row[peak_of(row)] / base[peak_of(row)]


def line(row: Row) -> str:
    """Format a row."""
    head = f"{row['network']:<18} {row['mode']:<7} {row['precision']} {'last ' if row['channels_last'] else 'first'}"
    parts = [f"{head} {title(row):<30}"]
    if "n_macs" in row:
        parts.append(f"{row['n_parameters'] / 1e6:>7.2f} M {row['n_macs'] / 1e9:>7.2f} G")
    for direction in DIRECTIONS:
        if f"{direction}_ms" in row:
            times, ratio = row[f"{direction}_ms"], row.get(f"{direction}_ratio", float("nan"))
            how = row.get(f"{direction}_timed_by", "graph").removeprefix("graph")
            parts.append(f"{times['median']:>9.2f} [{times['p20']:.2f}, {times['p80']:.2f}] {ratio:.3f} {how}")
    if "memory_ratio" in row:
        parts.append(f"{row[peak_of(row)] / 2**20:>7.0f} MB {row['memory_ratio']:.3f}")
    return " ".join(parts + ([f"failed: {row['failed']}"] if "failed" in row else []))


def markdown(result: dict[str, Any]) -> str:
    """Return a result's table: the main variants, at its first setting."""
    rows = [row for row in of_first_setting(result) if row["variant"] in networks.MAIN]
    fused = {(row["network"], row["variant"]): row for row in rows if row["fused"]}
    lines = []
    for row in rows:
        if row["fused"] or "training_ratio" not in row or "inference_ratio" not in row:
            continue
        inference = f"{row['inference_ratio']:.2f}"
        if "inference_ratio" in (other := fused.get((row["network"], row["variant"]), {})):
            inference += f", fused {other['inference_ratio']:.2f}"
        cells = [
            f"{row['network']}, {row['batch']} at {row['size']}",
            named(row),
            f"{row['n_parameters'] / 1e6:.1f} M",
            f"{row['n_macs'] / 1e9:.2f} G",
            f"{row['training_ratio']:.2f}",
            inference,
            f"{row['memory_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    environment = result["environment"]
    versions = environment["versions"]
    machine = (
        environment["gpu"]
        or f"{environment['processor']}, {environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    )
    return "\n".join(
        [
            "| network, batch | variant | parameters | MACs | training | inference | memory of training |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            f"{machine}, torch {versions['torch']}, timm {versions['timm']}, {setting_of(result['rows'][0]).name};"
            f" commit {environment['commit']}.",
        ]
    )
