"""Where the tests find things."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools"  # what tests share; scripts that they start in processes
RECORDED = ROOT / "tests" / "recorded"  # answers of published code
