"""How close to softmax a converted model is: what `hhbench fidelity` reports."""

from hhbench.fidelity.measures import FidelityReport, measure

__all__ = ["FidelityReport", "measure"]
