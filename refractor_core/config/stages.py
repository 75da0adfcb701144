"""Sizes of a pipeline: how many stages and micro batches each schedule takes. Rules of the document and generators of schedules read it."""

VIRTUAL: dict[str, tuple[int, int | None]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zb_h1": (1, 1),
    "zbv": (2, 2),
}
"""Kind of schedule → fewest and most stages per rank; None: any number."""


def problems(kind: str, pipeline: int, micro_batches: int, virtual: int) -> list[str]:
    """Everything that stands against a schedule of these sizes, each with the nearest legal choice; empty if it can be built."""
    if kind not in VIRTUAL:
        return [f"schedule {kind!r} is not known; choose one of {', '.join(VIRTUAL)}"]
    sizes = {"pipeline": pipeline, "micro_batches": micro_batches, "virtual": virtual}
    found = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if found:
        return found
    fewest, most = VIRTUAL[kind]
    if virtual < fewest or (most is not None and virtual > most):
        count = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
        plural = "stage" if fewest == 1 else "stages"
        other = "; for more, take kind interleaved" if most == 1 else "; for one, take kind 1f1b" if virtual == 1 else ""
        found.append(f"{kind} has {count} {plural} per rank, not virtual={virtual}: take virtual={fewest}{other}")
    if kind != "gpipe" and micro_batches < pipeline:
        found.append(
            f"{kind} on pipeline={pipeline} ranks needs at least {pipeline} micro batches, not {micro_batches}: "
            f"take micro_batches={pipeline}, pipeline={micro_batches}, or kind gpipe"
        )
    elif kind == "interleaved" and micro_batches % pipeline:
        below = micro_batches // pipeline * pipeline
        found.append(
            f"interleaved on pipeline={pipeline} ranks needs a multiple of {pipeline} micro batches, not {micro_batches}: "
            f"take micro_batches={below} or {below + pipeline}"
        )
    return found
