"""A look inside a dataset, as text for a terminal."""

from collections import Counter, defaultdict

from refractor_core.config.run import RunConfig
from refractor_core.data.audit import CHANGES
from refractor_core.data.dataset import AUDIT, DOCUMENTS, Dataset
from refractor_core.data.order import BatchPlan
from refractor_core.data.summary import Audit, funnel, stage_order

EXCERPT = 60
"""Characters shown of each end of a sequence, and of a removed document."""


def describe_dataset(dataset: Dataset, config: RunConfig) -> str:
    """Every source's funnel, and what each stage of the curriculum will read."""
    head = ("source", "domain", "access", "read", "removed", "documents", "tokens", "bytes/token", "held out")
    lines = [f"{dataset.path}: manifest {dataset.sha256[:12]}, Python {dataset.manifest.python_version}, {dataset.manifest.dtype} tokens"]
    lines += [f"differs from the configuration: {change}" for change in dataset.check_config(config)]
    rows = [head]
    for source in dataset.manifest.sources:
        train, removed = source.train, sum(source.removed.values())
        figures = train.documents, train.tokens, f"{train.bytes / train.tokens:.2f}", source.heldout.tokens
        rows.append((source.name, source.domain, source.access, source.read, removed, *figures))
    lines += _table(rows, 3)
    lines += [f"{source.name}: restricted to {', '.join(source.readers)}" for source in dataset.manifest.sources if source.readers]
    plan = BatchPlan(dataset, config)
    lines.append(f"packs in {plan.packs_folder}")
    return "\n".join(lines + describe_stages(plan))


def describe_stages(plan: BatchPlan) -> list[str]:
    """What each stage of the curriculum will read, in lines."""
    lines: list[str] = []
    epochs: dict[str, float] = defaultdict(float)
    for stage in plan.describe():
        lines.append(
            f"stage {stage['stage']}: steps {stage['first_step']} to {stage['until_step'] - 1}, {stage['sequences']} sequences of "
            f"{stage['sequence_length']}, {stage['global_batch_size']} a step; {stage['tokens']} tokens of {stage['documents']} documents, "
            f"{stage['padding']:.3%} padding"
        )
        for name, own in stage["sources"].items():
            epochs[name] += own["epochs"]
            if own["target"]:
                lines.append(
                    f"  {name:<14}{own['share']:>8.2%} of {own['target']:.2%}{own['tokens']:>14} tokens{own['documents']:>11} documents"
                    f"{own['epochs']:>9.2f} epochs, {epochs[name]:.2f} in all"
                )
            else:
                lines.append(f"  {name:<14}sits this stage out")
        if tasks := stage["retrieval"]:
            kinds = ", ".join(f"{count} {kind}" for kind, count in tasks["kinds"].items())
            lines.append(f"  retrieval tasks in {tasks['rows']} sequences: {kinds}")
            lines += [f"    of {length} tokens, by depth: {' '.join(map(str, depths))}" for length, depths in tasks["depths"].items()]
    return lines


def describe_funnel(dataset: Dataset) -> str:
    """``funnel`` as a table."""
    head = ("source", "after", "documents", "bytes", "tokens", "removed", "bytes removed", "changed")
    return "\n".join(_table([head, *(tuple(row.values()) for row in funnel(dataset, Audit.of(dataset)))], 2))


def _table(rows: list[tuple], texts: int) -> list[str]:
    """Rows as lines, columns as wide as they need; the first ``texts`` stand left, numbers right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(f"{cell:{'<' if place < texts else '>'}{widths[place]}}" for place, cell in enumerate(row)).rstrip() for row in cells]


def describe_removed(dataset: Dataset, samples: int) -> str:
    """How many documents each rule removed from each source, with the first ``samples`` of each rule; and apart from them those that were
    changed or reported, and stay."""
    rules: dict[tuple[str, str], list[dict]] = {}
    for row in dataset.audit().to_pylist():
        rules.setdefault((row["stage"], row["rule"]), []).append(row)
    ordered = sorted(rules.items(), key=lambda item: (stage_order(item[0][0]), -len(item[1]), item[0][1]))
    parts = [
        [line for key, rows in ordered if (key[0] in CHANGES) == stay for line in _rule(*key, rows, samples)] for stay in (False, True)
    ]
    removed, changed = parts
    head = ["", "changed or reported, in documents that stay:"] if changed else []
    return "\n".join([*(removed or ["nothing was removed"]), *head, *changed])


def _rule(stage: str, rule: str, rows: list[dict], samples: int) -> list[str]:
    """A rule's rows in lines."""
    sources = Counter(row["source"] for row in rows).most_common()
    lines = [f"{stage} / {rule}: {len(rows)} ({', '.join(f'{name} {count}' for name, count in sources)})"]
    for row in rows[:samples]:
        measured = "" if row["value"] is None else f" {row['value']:.4g}"
        measured += "" if row["threshold"] is None else f" against {row['threshold']:.4g}"
        twin = f", stays: {row['twin']}" if row["twin"] else ""
        lines.append(f"  {row['document']} {row['path']}{measured}{twin}: {row['detail'][:EXCERPT]!r}")
    return lines


def describe_document(dataset: Dataset, id: str, characters: int) -> str:
    """Provenance and the first ``characters`` of a kept document, or the audit row of a removed one.

    Raises:
        ValueError: the dataset has never seen such a document.
    """
    for row in dataset.documents().to_pylist():
        if row["id"] == id:
            stores = dataset.train if row["split"] == "train" else dataset.heldout
            store = stores[[source.name for source in dataset.manifest.sources].index(row["source"])]
            text = dataset.tokenizer.decode(store.document(row["position"]))
            return "\n".join([*(f"{key}: {value}" for key, value in row.items()), "", text[:characters]])
    for row in dataset.audit().to_pylist():
        if row["document"] == id:
            return "\n".join(f"{key}: {value}" for key, value in row.items() if value is not None)
    raise ValueError(f"--document {id}: neither {DOCUMENTS} nor {AUDIT} of {dataset.path} knows this id")


def describe_batch(dataset: Dataset, config: RunConfig, step: int) -> str:
    """Source, documents and both ends of every sequence of a step."""
    batch = BatchPlan(dataset, config).batch(step)
    rows, length = batch.tokens_BS.shape
    names = [source.name for source in dataset.manifest.sources]
    lines = [f"step {step}: {rows} sequences of {length}, {batch.loss_tokens} targets"]
    for row, tokens in enumerate(batch.tokens_BS.tolist()):
        inside = (batch.cu_seqlens >= row * length) & (batch.cu_seqlens < (row + 1) * length)
        text = dataset.tokenizer.decode(tokens)
        source = names[int(batch.sources_B[row])]
        lines.append(f"{row:>4} {source:<12}{int(inside.sum()):>3} documents  {text[:EXCERPT]!r} … {text[-EXCERPT:]!r}")
    return "\n".join(lines)
