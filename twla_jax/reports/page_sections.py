"""Makes the sections of a report's page, or says in a few words why one is left out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twla_jax.reports import page_figures as draw
from twla_jax.reports.page_facts import DOMAINS, Facts, Section


def headline(facts: Facts) -> dict[str, str]:
    """Return the figures at the head of the page, by their labels."""
    account = facts.account
    return {
        "bits a weight of the linears": f"{account['bits_per_weight_linear']:.2f}",
        "on the disk": f"{account['bytes_on_disk'] / 1e6:,.1f} MB",
        "weights": f"{account['weights'] / 1e6:,.1f} M",
        **{f"perplexity, {bits}": f"{value:.2f}" for bits, value in _scores(facts).items()},
    }


def _scores(facts: Facts) -> dict[str, float]:
    """Return the perplexities of the report, by bits of the activations or `original`."""
    found = facts.report.get("evaluation", {}).get("perplexity", {})
    return {
        "original" if bits == "full" else bits: value for bits, value in found.items() if value is not None
    }


def _sites(facts: Facts) -> Sequence[Mapping[str, Any]]:
    return (facts.report.get("layers") or {}).get("sites", ())


def _texts(facts: Facts) -> Sequence[Mapping[str, Any]]:
    return facts.domains or facts.report.get("evaluation", {}).get("by_domain", {}).get("domains", ())


def _points(facts: Facts) -> list[tuple[str, float, float]]:
    """Return name, bytes and perplexity of each recipe of a comparison, or of this model and its original."""
    if facts.recipes:
        found = [(row["name"], row["bytes"], row["perplexity"].items()) for row in facts.recipes]
        return [
            (f"{name} {bits}", size, score) for name, size, scores in found for bits, score in scores if score
        ]
    stored = facts.account["bytes_accounted"] - facts.account["breakdown"]["tokenizer_and_metadata"]
    sizes = {"original": 2 * facts.account["weights"]}  # in 16 bits
    return [(bits, sizes.get(bits, stored), score) for bits, score in _scores(facts).items()]


def _no_original(facts: Facts) -> str:
    if facts.original is None:
        return "give --against MODEL, the original"
    return "" if facts.original["weights"] else "the recipe rotates no inputs"


def _no_points(facts: Facts) -> str:
    return "" if len(_points(facts)) > 1 else "report.json has no perplexity"


def _no_texts(facts: Facts) -> str:
    return (
        ""
        if DOMAINS.accepts(_texts(facts))
        else "give --figures FILE, from twla eval --domains --against --json"
    )


def _no_errors(facts: Facts) -> str:
    return "" if _sites(facts) else "report.json has no errors by site"


def _nothing(facts: Facts) -> str:
    return ""


def _no_allocation(facts: Facts) -> str:
    known = facts.table is not None and "allocation" in facts.report
    return "" if known else "no bits were allocated; twla allocate does"


def _no_samples(facts: Facts) -> str:
    return (
        "" if facts.original or facts.report.get("evaluation", {}).get("sample") else "give --against MODEL"
    )


def _no_times(facts: Facts) -> str:
    return "" if facts.report.get("seconds") else "report.json has no times"


def _weights(facts: Facts) -> Section:
    assert facts.original is not None
    edges, figures = facts.original["edges"], {}
    for site, found in facts.original["weights"].items():
        shapes = {"original": found["before"], "rotated": found["after"]}
        figures[f"{site}, block {found['layer']}"] = draw.densities(edges, shapes)
    text = (
        "A ternary weight has three values. KOTMS rotates the inputs of linears to bring their weights nearer to three"
        " groups; the product stays the same."
    )
    return Section(text=text, figures=figures)


def _activations(facts: Facts) -> Section:
    assert facts.original is not None
    peaks = {site: (found["before"], found["after"]) for site, found in facts.original["peaks"].items()}
    figure = draw.before_and_after(peaks, "largest value over root mean square")
    text = "Few bits have to reach from a token's smallest value to its largest; a rotation spreads outliers."
    return Section(text=text, figures={"largest value of a token's input, mean over tokens": figure})


def _against_bytes(facts: Facts) -> Section:
    points = _points(facts)
    return Section(
        text="From twla compare."
        if facts.recipes
        else "Add other recipes: --figures FILE, from twla compare --json.",
        figures={"perplexity over stored bytes": draw.against_bytes(points)},
        head=["", "MB", "perplexity"],
        rows=[[name, f"{size / 1e6:,.1f}", f"{score:.2f}"] for name, size, score in points],
    )


def _domains(facts: Facts) -> Section:
    rows = sorted(_texts(facts), key=lambda row: row["ratio"])
    figure = draw.bars(
        {row["name"]: row["ratio"] for row in rows}, "perplexity over the original's", line=1.0
    )
    keys = ("perplexity", "original_perplexity", "ratio")
    return Section(
        figures={"ratio of perplexities by text": figure},
        head=["text", "perplexity", "original", "ratio"],
        rows=[[row["name"], *(f"{row[key]:.2f}" for key in keys)] for row in rows],
    )


def _errors(facts: Facts) -> Section:
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for each in _sites(facts):
        by_site.setdefault(each["site"], []).append(each)
    figures = {}
    for key, caption in _ERRORS.items():
        values = {site: [each[key] for each in rows] for site, rows in by_site.items()}
        figures[caption] = draw.by_layer(values, key.replace("_", " "))
    return Section(text="Each linear is compared with the original before any refinement.", figures=figures)


def _bytes(facts: Facts) -> Section:
    sizes = {name.replace("_", " "): size for name, size in facts.account["breakdown"].items() if size}
    figure = draw.bars({name: size / 1e6 for name, size in sizes.items()}, "MB", form="{:,.2f}")
    total = sum(sizes.values())
    return Section(
        text="Every byte of the folder's files, counted from what is stored.",
        figures={"bytes by what they hold": figure},
        head=["", "bytes", "share"],
        rows=[[name, f"{size:,}", f"{size / total:.1%}"] for name, size in sizes.items()],
    )


def _allocation(facts: Facts) -> Section:
    chosen, table = facts.report["allocation"], facts.table
    assert table is not None
    figures = {
        "what fewer bits cost at each site": draw.costs(table),
        "what neighbours cost together": draw.interactions(table),
        "bits chosen": draw.bits(chosen),
        "loss by way to allocate": draw.losses(chosen),
    }
    text = f"ILA-AMP, {chosen['after']['average_bits']:.2f} bits on average under a budget of {chosen['budget']:g}."
    return Section(text=text, figures=figures)


def _samples(facts: Facts) -> Section:
    if facts.original is not None:
        return Section(text=f"“{facts.original['prompt']} …”", samples=facts.original["samples"])
    text = (
        "Drawn at temperature 1 after the check text's first tokens; --against sets the original's beside it."
    )
    return Section(text=text, samples={facts.name: str(facts.report["evaluation"]["sample"])})


def _time(facts: Facts) -> Section:
    rows = [[name, f"{spent:.1f}"] for name, spent in facts.report["seconds"].items()]
    return Section(head=["phase", "seconds"], rows=rows)


_ERRORS = {
    "output_error": "error of outputs on calibration text, relative",
    "weight_error": "error of weights, relative",
}
# Each with what says why it is left out, if it is.
SECTIONS: dict[str, tuple[Callable[[Facts], str], Callable[[Facts], Section]]] = {
    "Weights before and after shaping": (_no_original, _weights),
    "Perplexity and bytes": (_no_points, _against_bytes),
    "Quality by text": (_no_texts, _domains),
    "Errors by site and block": (_no_errors, _errors),
    "Where the bytes are": (_nothing, _bytes),
    "Activations before and after rotation": (_no_original, _activations),
    "Activation bits": (_no_allocation, _allocation),
    "Samples": (_no_samples, _samples),
    "Time": (_no_times, _time),
}
