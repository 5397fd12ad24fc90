"""Running a network on other weights or another layout without touching it."""
