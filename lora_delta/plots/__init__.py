"""Plots: deltas in two dimensions, losses by step, bars. They need the extra ``plots``."""

from .charts import plot_bars, plot_deltas, plot_loss_curves, silhouette_score

__all__ = ["plot_bars", "plot_deltas", "plot_loss_curves", "silhouette_score"]
