"""Fused operations in the place of a model's own, without touching its parameters."""

from fastdiff.acceleration.accelerate import accelerate, is_accelerated, report, restore
from fastdiff.acceleration.outcome import Report

__all__ = ["Report", "accelerate", "is_accelerated", "report", "restore"]
