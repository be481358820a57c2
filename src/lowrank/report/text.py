"""Results for a terminal: rich tables that are right at 80 columns, and plain text when piped."""

from __future__ import annotations

import io
import math
import shutil
import statistics
import sys
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank.merge import MergedFolder
from lowrank.quantise_folder import QuantisedFolder
from lowrank.report.data import Metric, RunReport
from lowrank.report.words import amount, number, percent
from lowrank.verify import Candidates, OutputCheck, Verification


def show(result: RenderableType, file: IO[str] | None = None) -> None:
    """Print one of the results below; colours only on a terminal, 80 to 100 columns wide."""
    file = sys.stdout if file is None else file
    if file.isatty():
        width = min(100, shutil.get_terminal_size((80, 24)).columns)
        Console(file=file, width=width, highlight=False).print(result)
        return
    text = io.StringIO()
    Console(file=text, width=80, highlight=False, color_system=None).print(result)
    file.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def verification(v: Verification) -> RenderableType:
    """The verdict, the evidence, and the reasons and warnings."""
    verdict = Text("PASSED", "bold green") if v.passed else Text("FAILED", "bold red")
    head = Text.assemble(verdict, "  ", (v.merged, "bold"), f" = {v.base} + {v.adapter}")
    parts: list[RenderableType] = [head, "", fact_table(_tensor_facts(v))]
    wrong = [check for check in v.worst if check.problem]
    if wrong:
        table = _table("wrong tensors", "of ΔW", "what is wrong")
        for check in wrong:
            table.add_row(check.name, number(check.present, "z.2f"), check.problem)
        parts += ["", table]
    if v.outputs is not None:
        parts += ["", _output_table(v.outputs)]
        if v.outputs.perplexity_merged is not None:
            parts += ["", fact_table([("perplexity", _perplexities(v.outputs))])]
    if v.candidates is not None:
        parts += ["", _candidate_table(v.candidates, v.onto)]
    parts += [_remark("✗", "red", reason) for reason in v.reasons]
    parts += [_remark("!", "yellow", warning) for warning in v.warnings]
    return Group(*parts)


def merged(m: MergedFolder, candidates: bool = True) -> RenderableType:
    """What was written, and what rounding cost. candidates: also the table of both, which `verification` has too."""
    worst = (m.rounding[0].loss, m.rounding[0].name) if m.rounding else (None, None)
    facts = [
        ("written", f"{m.path} ({amount(m.total_bytes, 'B')}, {m.dtype})"),
        ("from", f"{m.base} + {m.adapter}"),
        ("rounding", _rounding(m.overall_rounding, *worst) + _for_inputs(m)),
        (
            "tokenizer",
            f"from {m.tokenizer}" if m.tokenizer else "none: neither base nor adapter has one",
        ),
    ]
    if m.onto:
        facts.insert(2, ("onto", f"the {m.onto} weights: {m.why}"))
    if m.untied:
        facts.append(("embeddings", "untied: input and output are two tensors now"))
    if m.candidates is None or not candidates:
        return fact_table(facts)
    return Group(fact_table(facts), "", _candidate_table(m.candidates, m.onto))


def quantised(q: QuantisedFolder) -> RenderableType:
    """What was written in few bits, and what that costs."""
    worst = q.weights[0]
    facts = [
        ("written", f"{q.path} ({amount(q.total_bytes, 'B')}, was {amount(q.base_bytes, 'B')})"),
        ("from", q.base),
        (
            "weights",
            f"{len(q.weights)} in {q.quantisation}; as they were: {', '.join(q.kept) or 'none'}",
        ),
        ("off by", f"{percent(q.error)} of ‖W‖; most at {worst.name}: {percent(worst.error)}"),
    ]
    if q.loss is not None and q.loss_base is not None:
        change = number(q.loss - q.loss_base, "+.4f")
        by = f"{change} ± {number(q.loss_error, '.4f')}, {q.tokens:,} tokens"
        facts.append(("loss", f"{q.loss_base:.4f} → {q.loss:.4f} nats a token ({by})"))
    return fact_table(facts)


def summary(data: RunReport) -> RenderableType:
    """A training run's numbers: metrics before and after, parameters, costs, verdict."""
    full = any(metric.full is not None for metric in data.metrics)
    columns = ["base", "LoRA", *(["full fine-tuning"] if full else [])]
    table = _table("", *columns)
    for metric in data.metrics:
        values = [metric.before, metric.after, *([metric.full] if full else [])]
        table.add_row(metric.name, *(written(metric, value) for value in values))
    parts: list[RenderableType] = [Text(data.title, "bold")]
    parts += ["", table] if data.metrics else []
    facts = [
        (cost.name, f"{cost.value} ({cost.note})" if cost.note else cost.value)
        for cost in data.costs
    ]
    if data.trainable_params is not None and data.total_params:
        share = data.trainable_params / data.total_params
        line = f"{data.trainable_params:,} of {data.total_params:,} ({share:.2%})"
        facts.insert(0, ("trainable parameters", line))
    if data.verification is not None:
        facts.append(("merged and verified", "passed" if data.verification.passed else "FAILED"))
    parts += ["", fact_table(facts)] if facts else []
    return Group(*parts)


def written(metric: Metric, value: float | None) -> str:
    """A metric's value in its own format; a dash where it is not known."""
    return number(value, metric.format)


def _tensor_facts(v: Verification) -> list[tuple[str, str]]:
    total = v.adapted + v.untouched
    facts = [
        (
            "tensors",
            f"{v.right} of {total} hold what they should "
            f"({v.adapted} changed by the adapter, {v.untouched} the base's), {v.dtype}",
        )
    ]
    costs = [(c.rounding, c.name) for c in v.worst if not c.problem and c.rounding is not None]
    if v.rounding is not None:
        facts.append(("rounding", _rounding(v.rounding, *(costs[0] if costs else (None, None)))))
    ties = {True: "one tensor", False: "two tensors"}
    if v.tied_base is not None and v.tied_merged is not None:
        facts.append(
            (
                "embeddings",
                f"input and output {ties[v.tied_merged]}; in the base {ties[v.tied_base]}",
            )
        )
    if v.outputs is not None:
        facts.append(("inputs", f"{v.outputs.source}, {v.outputs.positions} positions compared"))
    return facts


def _for_inputs(m: MergedFolder) -> str:
    measured = [row.outputs for row in m.rounding if row.outputs is not None]
    if not measured:
        return ""
    return f"; of its outputs on the given inputs, {percent(statistics.median(measured))} (median layer)"


def _rounding(overall: float | None, worst: float | None, name: str | None) -> str:
    text = f"{percent(overall)} of the adapter's change of the weights"
    return text if name is None else f"{text}; most at {name}: {percent(worst)}"


def _output_table(o: OutputCheck) -> Table:
    table = _table("against base + adapter", "merged", "base alone", "merged / base")
    rows = [
        (f"{o.what}, rms", o.rms_difference, o.effect),
        (f"{o.what}, mean", o.mean_difference, o.mean_effect),
        (f"{o.what}, largest", o.max_difference, o.max_effect),
        ("KL divergence, nats", o.kl, o.kl_effect),
    ]
    for name, difference, effect in rows:
        if difference is not None and effect is not None:
            share = percent(difference / effect) if effect else "–"
            table.add_row(name, number(difference), number(effect), share)
    if o.top1_agreement is not None:
        table.add_row(
            "same first choice", percent(o.top1_agreement), percent(o.top1_agreement_base), ""
        )
    return table


def _candidate_table(c: Candidates, onto: str | None) -> RenderableType:
    """The two that an adapter trained on a quantised base can be merged onto, against what was trained."""
    first = next(iter(c.by_name.values()))
    table = _table(
        f"in {c.dtype}, against training", first.what, "of the effect", "first choice", "loss"
    )
    for name, o in c.by_name.items():
        share = "–" if o.relative_difference is None else percent(o.relative_difference)
        written = " ← written" if name == onto else ""
        loss = number(_loss(o.perplexity_merged), ".4f")
        values = number(o.rms_difference), share, percent(o.top1_agreement), loss
        table.add_row(f"{name} + ΔW{written}", *values)
    trained = "quantised + ΔW (trained)"
    table.add_row(trained, "", "", "", number(_loss(first.perplexity_adapter), ".4f"))
    table.add_row("quantised base", "", "", "", number(_loss(first.perplexity_base), ".4f"))
    table.add_row("original base", "", "", "", number(_loss(c.original_base), ".4f"))
    return Group(fact_table([("trained on", c.quantisation)]), table)


def _loss(perplexity: float | None) -> float | None:
    """Nats a token."""
    return math.log(perplexity) if perplexity else None


def _perplexities(o: OutputCheck) -> str:
    return (
        f"base {number(o.perplexity_base, '.4g')}, base + adapter {number(o.perplexity_adapter, '.4g')}, "
        f"merged {number(o.perplexity_merged, '.4g')} ({o.perplexity_tokens:,} tokens)"
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=True, padding=(0, 1), header_style="dim")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column != "what is wrong" else "left")
    return table


def fact_table(facts: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=True, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def _remark(mark: str, colour: str, text: str) -> RenderableType:
    row: Any = Table(box=None, show_header=False, padding=(0, 1))
    row.add_column(style=colour, no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(mark, Text(text))
    return Padding(row, (1, 0, 0, 0))
