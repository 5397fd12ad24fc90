"""fastdiff inside other codebases; each package needs the one it is named after."""
