"""Synthetic checkpoints as files, in every layout that published ones come in: no licence needed to try them."""

from wsi_rt.export.layouts.plan import DTYPES, LAYOUTS, LayoutPlan, plan_layout, write_layout

__all__ = ["DTYPES", "LAYOUTS", "LayoutPlan", "plan_layout", "write_layout"]
