"""fastdiff in the codebases people already have."""
