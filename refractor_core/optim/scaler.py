"""Dynamic loss scaling for fp16: gradients of loss · scale keep small ones above fp16's smallest number (arXiv 1710.03740)."""

from refractor_core.config.training import LARGEST_LOSS_SCALE, PrecisionConfig


class LossScaler:
    """Halves the scale after an overflow and doubles it after a window of clean steps, between 1 and 2²⁴. Outside fp16 it is 1 for good.

    Args:
        config: section ``precision``.
    """

    def __init__(self, config: PrecisionConfig):
        self._dynamic = config.compute == "fp16"
        self._window = config.loss_scale_window
        self._clean_steps = 0
        self.scale: float = config.initial_loss_scale if self._dynamic else 1.0
        """Factor on the loss before the backward pass; divide the gradients by it."""

    def update(self, found_nonfinite: bool) -> None:
        """Tells how the step went: ``found_nonfinite`` means the gradients overflowed and the step was skipped."""
        if not self._dynamic:
            return
        if found_nonfinite:
            self.scale, self._clean_steps = max(self.scale / 2, 1.0), 0
            return
        self._clean_steps += 1
        if self._clean_steps == self._window:
            # Bounded, or gradients that are all zero would drive the scale to infinity, from where halving does not lead back.
            self.scale, self._clean_steps = min(self.scale * 2, LARGEST_LOSS_SCALE), 0

    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps, JSON-able; empty outside fp16."""
        return {"scale": self.scale, "clean_steps": self._clean_steps} if self._dynamic else {}

    def load_state(self, state: dict[str, float | int]) -> None:
        """Takes ``state()`` back. A run that has changed to or from fp16 since then starts as its config says.

        Raises:
            ValueError: the state has other fields.
        """
        if state and state.keys() != {"scale", "clean_steps"}:
            told = f"loss scaler state has fields {sorted(state)}, expected scale and clean_steps"
            raise ValueError(f"{told}; was the checkpoint written by another version?")
        if self._dynamic and state:
            self.scale, self._clean_steps = float(state["scale"]), int(state["clean_steps"])
